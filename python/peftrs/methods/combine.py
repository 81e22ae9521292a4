"""Sums of changes of low rank, from their factors: no `(out, in)` matrix is ever formed.

A term is a pair `up (out, r)`, `down (r, in)` whose product is one change, scaling and weight included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Term = tuple[Tensor, Tensor]


def stacked(terms: Sequence[Term]) -> Term:
    """The exact sum of the terms, of the sum of their ranks."""
    return torch.cat([up for up, _ in terms], 1), torch.cat([down for _, down in terms])


def truncated(terms: Sequence[Term], rank: int, clamp: float | None = None, driver: str | None = None) -> Term:
    """The best approximation of the sum that has this rank: `up = U·S`, `down = Vᵀ` of its singular value decomposition.

    With `U·K·Vᵀ` from the QR decompositions of both stacks, only the small `K` is decomposed. `clamp` is the quantile of the
    result's entries beyond which they are cut off, on both sides alike.
    """
    up, down = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in stacked(terms))
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.mT)
    u, s, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False, driver=driver)
    up, down = left @ (u[:, :rank] * s[:rank]), v[:rank] @ right.mT
    if clamp is not None:
        entries = torch.cat([up.flatten(), down.flatten()])
        bound = float(entries.sort().values[round(clamp * (entries.numel() - 1))])
        up, down = up.clamp(-bound, bound), down.clamp(-bound, bound)
    return padded((up, down), rank)


def padded(term: Term, rank: int) -> Term:
    """The same change with factors of a larger rank, filled up with zeros."""
    up, down = term
    extra = rank - up.shape[1]
    return torch.cat([up, up.new_zeros(up.shape[0], extra)], 1), torch.cat([down, down.new_zeros(extra, down.shape[1])])
