"""Factors whose product starts at zero although neither is: interleaved rows of one random orthogonal
matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftrs.bases.kinds import Affine, LayerKind, LayerSpec
from peftrs.methods.lora.inits.start import Start


@dataclass(frozen=True)
class Orthogonal(Start):
    """https://datta0.github.io/posts/rethink-lora-init/: `A = (G₁ Q_even)ᵀ / 10`, `B = G₂ Q_odd / 10`, G
    normal; `B·A = 0`.
    """

    kinds: ClassVar[frozenset[LayerKind]] = frozenset(
        {LayerKind.LINEAR, LayerKind.ATTENTION, LayerKind.PARAMETER}
    )

    def fault(self, rank: int, spec: LayerSpec) -> str | None:
        return f"it needs an even rank, not {rank}" if rank % 2 else None

    def __call__(self, adapter: Any, base: Affine) -> dict[str, Tensor]:
        down, up = adapter["lora_A.weight"], adapter["lora_B.weight"]
        rank = down.shape[0]
        basis = torch.linalg.qr(torch.randn(rank, rank, device=down.device)).Q
        inputs = torch.randn(down.shape[1], rank // 2, device=down.device)
        outputs = torch.randn(up.shape[0], rank // 2, device=up.device)
        return {"lora_A.weight": (inputs @ basis[0::2]).T / 10, "lora_B.weight": outputs @ basis[1::2] / 10}
