"""OLoRA: the first factors are the first columns and rows of `W = Q·R`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftrs.bases.kinds import Affine, LayerKind, LayerSpec


@dataclass(frozen=True)
class Olora:
    """Büyükakyüz 2024, https://arxiv.org/abs/2406.01775."""

    changes_base: ClassVar[bool] = True
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR})

    def fault(self, rank: int, spec: LayerSpec) -> str | None:
        smaller = min(spec.shape)
        return f"rank {rank} is over the smaller side of the weight, {smaller}" if rank > smaller else None

    def __call__(self, adapter: Any, base: Affine) -> dict[str, Tensor]:
        rank = adapter.values["r"]
        basis, triangle = torch.linalg.qr(base.weight.detach().to(torch.float32))
        return {"lora_A.weight": triangle[:rank], "lora_B.weight": basis[:, :rank]}
