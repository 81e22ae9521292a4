"""weight += up @ down in place, rounded once: the Rust kernel on CPU tensors, blocks of rows in torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from peftrs import _native

ROWS = 256
"""Rows a block in torch: the wide copy of a block stays small beside the weight (256 rows of 14,336 are 14 MB in float32)."""

NATIVE = {torch.float32: ("F32", torch.float64), torch.float16: ("F16", torch.float32), torch.bfloat16: ("BF16", torch.float32)}
"""The weight dtypes that the Rust kernel takes, as it names them, with the dtype that it takes factors and accumulates in."""


@torch.no_grad()
def add_low_rank_(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Adds `up @ down` to `weight` in place, accumulating in the dtype of the factors and rounding once.

    `weight` is `(rows, columns)` and contiguous, or a stack `(n, rows, columns)` of such; `up` is `(rows, r)`, `down`
    `(r, columns)`, stacked likewise.
    """
    if weight.ndim == 3:
        for one, its_up, its_down in zip(weight, up, down, strict=True):
            add_low_rank_(one, its_up, its_down)
        return weight
    name, dtype = NATIVE.get(weight.dtype, ("", None))
    if weight.device.type == "cpu" and up.dtype is dtype and weight.is_contiguous():
        up, down = up.contiguous(), down.contiguous()
        rows, columns = weight.shape
        _native.add_low_rank(weight.data_ptr(), name, rows, columns, up.data_ptr(), down.data_ptr(), up.shape[1], 1.0)
        torch.autograd.graph.increment_version(weight)
        return weight
    for start in range(0, weight.shape[0], ROWS):
        block = weight[start : start + ROWS]
        block.copy_(torch.addmm(block.to(up.dtype), up[start : start + ROWS], down))
    return weight
