"""Columns of changed length: `y = z + z ∘ change`, one change a column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def strengthen(z: Tensor, change: Tensor) -> Tensor:
    """`z + z ∘ change`, `z (..., out)`, `change (out,)`, both in one dtype."""
    return Strengthen.apply(z, change)  # type: ignore[no-any-return]


class Strengthen(torch.autograd.Function):
    """One pass over `dy` makes the gradient of `z`, where autograd's own graph takes two."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, change: Tensor) -> Tensor:
        ctx.save_for_backward(z, change)
        return torch.addcmul(z, z, change)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        z, change = ctx.saved_tensors
        dy = gradients[0]
        return torch.addcmul(dy, dy, change), (dy * z).sum(tuple(range(z.ndim - 1)))
