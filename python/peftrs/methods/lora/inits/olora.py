"""OLoRA: the first factors are the first columns and rows of `W = Q·R`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftrs.bases.kinds import Affine
from peftrs.methods.lora.inits.start import Start


@dataclass(frozen=True)
class Olora(Start):
    """Büyükakyüz 2024, https://arxiv.org/abs/2406.01775."""

    changes_base: ClassVar[bool] = True

    def __call__(self, adapter: Any, base: Affine) -> dict[str, Tensor]:
        rank = adapter.values["r"]
        basis, triangle = torch.linalg.qr(base.weight.detach().to(torch.float32))
        return {"lora_A.weight": triangle[:rank], "lora_B.weight": basis[:, :rank]}
