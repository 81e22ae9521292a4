"""One reused tensor that the weight of a quantized layer is dequantized into, while a product with it is
taken on a CPU.

Large tensors are new memory there at every call: what takes more than 32 MB, glibc asks the system for and
gives back, and the system hands it out page by page, at 3.5 µs each where this was measured. Of a weight of
4096 × 4096, and of each tensor that a library makes on the way, that is several times what its numbers take.
So rows are dequantized a block at a time, which stays in the processor's cache, and put into memory that is
kept: of that weight, one thread, nf4 into float32 takes 8 ms for 36, int8 into bfloat16 7 for 129, torchao's
int8 5 for 136. A thread keeps as much of each dtype as its largest weight took. On GPUs the allocator keeps
memory anyway, and a captured graph would go on reading a workspace that had to grow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rows = Callable[[int, int, Tensor], object]
"""Dequantizes the rows from the first number to before the second into a tensor, each to its bits in the
whole weight.
"""

BLOCK = 2**19
"""Elements dequantized at a time; a weight of no more is not worth a place of its own."""


class _Held(threading.local):
    def __init__(self) -> None:
        self.tensors: dict[torch.dtype, Tensor] = {}


_held = _Held()


def made(rows: Rows, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight `(out, in)` of all rows, in memory of its own."""
    weight = torch.empty(*shape, dtype=dtype, device="cpu")
    rows(0, shape[0], weight)
    return weight


def filled(rows: Rows, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight `(out, in)` of all rows, to be read until this thread asks for another one."""
    count, width = shape
    step = max(BLOCK // width, 1)
    if count <= step:
        return made(rows, shape, dtype)
    held = _held.tensors.get(dtype)
    if held is None or held.numel() < count * width:
        with torch.inference_mode(False):  # made there, it could be written nowhere else
            held = _held.tensors[dtype] = torch.empty(count * width, dtype=dtype, device="cpu")
    weight = held[: count * width].view(count, width)
    for start in range(0, count, step):
        stop = min(start + step, count)
        rows(start, stop, weight[start:stop])
    return weight
