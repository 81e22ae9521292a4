"""PiSSA: the first factors are the principal singular components of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftrs.bases.kinds import Affine
from peftrs.methods.lora.inits.start import Start, principal


@dataclass(frozen=True)
class Pissa(Start):
    """Meng et al. 2024, https://arxiv.org/abs/2404.02948: `A = √(S/s)·Vᵀ`, `B = U·√(S/s)` of the largest `r`
    components.

    With `iterations` a randomised SVD of that many subspace iterations takes the place of the full one. It
    draws from a generator of its own, so that loading an adapter finds the same first factors that training
    started from.
    """

    iterations: int | None = None
    changes_base: ClassVar[bool] = True

    def __call__(self, adapter: Any, base: Affine) -> dict[str, Tensor]:
        weight = base.weight.detach().to(torch.float32)
        if self.iterations is None:
            left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(0)
                left, singular, right = torch.svd_lowrank(weight, adapter.values["r"], niter=self.iterations)
            right = right.mT
        return principal(left, singular, right, adapter)
