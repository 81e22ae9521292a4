"""The passes of `reference` as Triton kernels, with the same arguments, on NVIDIA GPUs of compute capability
8.0 and later.

Beyond the library's own products with the frozen weight they move: one read of `x` and one write of the
output forward; one read of `dy`, one of `x` and one write of `dx` backward. The products with the frozen
weight then accumulate in place. Nothing is tuned at run time and no sum depends on timing, so that a step
costs what it costs from the first and repeats to the bit.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from peftrs.ops.lora_linear import kernels
from peftrs.ops.lora_linear.reference import MASKS, Dropout, Gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs kernels on CPU tensors: how they are tested where there is no GPU."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RANKS = 128
"""The largest rank: beyond, the products are not skinny and the library's are as good."""


COMMON = {"UPCAST": INTERPRETED, "enable_fp_fusion": True}


class Tile(NamedTuple):
    """How many rows and columns of the large matrix a program takes at once, and how it is scheduled."""

    rows: int
    columns: int
    warps: int
    stages: int = 3


TILES = {
    2: {
        16: (Tile(64, 128, 4), Tile(64, 64, 4)),
        32: (Tile(64, 64, 4), Tile(64, 64, 4)),
        64: (Tile(64, 32, 4, 4), Tile(64, 64, 8)),
        128: (Tile(64, 64, 8, 2), Tile(32, 64, 8)),
    },
    4: {
        16: (Tile(64, 64, 4), Tile(64, 32, 4)),
        32: (Tile(64, 32, 4), Tile(32, 32, 4)),
        64: (Tile(32, 32, 4), Tile(32, 32, 4)),
        128: (Tile(32, 32, 8), Tile(16, 32, 8)),
    },
}
"""The tiles of `down` and `across` by bytes of an element and padded rank: no more than 99 KiB of shared
memory on any device, and at least 16 KiB of the large matrix on its way to a processor, which hides the
latency of memory.
"""
BOTH = {2: Tile(256, 32, 8), 4: Tile(128, 32, 8, 2)}
UP = {2: Tile(64, 128, 4), 4: Tile(64, 64, 4)}
JOINED = 32
"""The largest rank at which one pass of `dy` beats two. A tile of `m` rows writes and reads again `r` float32
sums for each of its `m` elements of a column: of two-byte elements `4·r/m` of a pass, half of one at `r =
32`; beyond, a second read is cheaper.
"""


@cache
def is_available(device: torch.device) -> bool:
    """Whether the kernels run on a device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return INTERPRETED and device.type == "cpu"
    return torch.cuda.get_device_capability(device) >= (8, 0)


def fits(x: Tensor, down: Tensor) -> bool:
    """Whether the kernels take these."""
    return (
        x.dtype in DTYPES
        and down.dtype in (x.dtype, torch.float32)
        and 0 < down.shape[0] <= RANKS
        and x.numel() > 0
        and is_available(x.device)
    )


def low(x: Tensor, down: Tensor, dropout: Dropout | None) -> Tensor:
    """`u = (x ∘ mask)·Aᵀ`, `(M, r)`, in the dtype of `A`."""
    with _on(x):
        return _down(x, down, down.dtype, dropout)


def high(u: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, scaling: float) -> Tensor:
    """`y = scaling·u·Bᵀ + bias + x·Wᵀ`, `(M, out)`, in the dtype of `x`."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    with _on(x):
        _up(u, up.t(), bias, y, scaling, None)
    return y.addmm_(x, weight.t())


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    u: Tensor,
    scaling: float,
    dropout: Dropout | None,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """The gradients of `x`, `A` and `B`, the last two in the dtype of the factors, which may be float32 over
    a narrower `x`.
    """
    need_x, need_down, need_up = needs
    du = dx = d_down = d_up = None
    with _on(x):
        if need_up and (need_x or need_down) and _padded(u.shape[1]) <= JOINED:
            du, d_up = _both(dy, up, u, scaling)
        else:
            if need_x or need_down:
                du = _down(dy, up.t(), dy.dtype, None)
            if need_up:
                d_up, _ = _across(u, dy, None, up.dtype, scaling, None, transposed=True)
        if du is not None and need_down:
            # float32 beyond this rank holds too many values at once for one kernel to make both.
            start = need_x and (x.itemsize == 2 or _padded(du.shape[1]) <= JOINED)
            d_down, dx = _across(du, x, down if start else None, down.dtype, scaling, dropout)
        if du is not None and need_x and dx is None:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            _up(du, down, None, dx, scaling, dropout)
    return Gradients(None if dx is None else dx.addmm_(dy, weight), d_down, d_up)


def mask(rows: int, columns: int, dropout: Dropout) -> Tensor:
    """Whether each element is kept, `(rows, columns)`: what the kernels find by themselves."""
    seed = _seed(dropout)
    out = torch.empty(rows, columns, dtype=torch.int8, device=seed.device)
    with _on(out):
        kernels.mask[_blocks(rows, 64), _blocks(columns, 64)](
            out, seed, rows, columns, dropout.dropped, M=64, K=64, enable_fp_fusion=True
        )
    return out.view(torch.bool)


MASKS["cuda"] = mask


def _seed(dropout: Dropout) -> Tensor:
    assert isinstance(dropout.seed, Tensor)
    return dropout.seed


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments lie on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _padded(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def _parts(blocks: int, length: int, tile: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts a sum over `length` is cut, so that every processor has two programs, and the
    length of one.
    """
    tiles = _blocks(length, tile)
    share = _blocks(tiles, min(tiles, _blocks(2 * _processors(device), blocks))) * tile
    return _blocks(length, share), share


def _sums(parts: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for the sums of all parts: where there is one, it is the result itself."""
    return torch.empty(parts, *shape, dtype=torch.float32 if parts > 1 else dtype, device=device)


def _added(sums: Tensor, dtype: torch.dtype) -> Tensor:
    if sums.dtype == dtype and sums.shape[0] == 1:
        return sums[0]
    out = torch.empty(sums.shape[1:], dtype=dtype, device=sums.device)
    kernels.add[(_blocks(out.numel(), 256),)](
        sums, out, sums.shape[0], out.numel(), BLOCK=256, enable_fp_fusion=True
    )
    return out


def _options(tile: Tile) -> dict[str, int | bool]:
    return {"M": tile.rows, "K": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages, **COMMON}


def _drop(dropout: Dropout | None) -> tuple[Tensor | None, int]:
    return (None, 0) if dropout is None else (_seed(dropout), dropout.dropped)


def _down(x: Tensor, factor: Tensor, dtype: torch.dtype, dropout: Dropout | None) -> Tensor:
    (rows, columns), rank = x.shape, factor.shape[0]
    padded = _padded(rank)
    tile = TILES[x.itemsize][padded][0]
    blocks = _blocks(rows, tile.rows)
    parts, share = _parts(blocks, columns, tile.columns, x.device)
    sums = _sums(parts, (rows, rank), dtype, x.device)
    seed, dropped = _drop(dropout)
    split = (
        factor.dtype != x.dtype and dtype != x.dtype
    )  # what is rounded to the narrow dtype anyway needs no more
    kernels.down[blocks, parts](
        x, factor, sums, seed, rows, columns, rank, *x.stride(), *factor.stride(), share, dropped,
        R=padded, SPLIT=split, DROP=dropout is not None, PRECISION="ieee", **_options(tile),
    )  # fmt: skip
    return _added(sums, dtype)


def _up(
    u: Tensor, factor: Tensor, bias: Tensor | None, y: Tensor, scaling: float, dropout: Dropout | None
) -> None:
    rows, columns = y.shape
    tile = UP[y.itemsize]
    seed, dropped = _drop(dropout)
    # Three products of 11 bits each: near to float32's own, in a fraction of the time.
    precision = "tf32x3" if y.itemsize == 2 and u.dtype is torch.float32 else "ieee"
    kernels.up[_blocks(rows, tile.rows), _blocks(columns, tile.columns)](
        u, factor, bias, y, seed, rows, columns, factor.shape[0], u.stride(0), *factor.stride(), scaling,
        dropped,
        R=16, BIAS=bias is not None, DROP=dropout is not None, PRECISION=precision, **_options(tile),
    )  # fmt: skip


def _across(
    g: Tensor,
    x: Tensor,
    factor: Tensor | None,
    dtype: torch.dtype,
    scaling: float,
    dropout: Dropout | None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`scaling·gᵀ·(x ∘ mask)`, `(r, in)` or `transposed`, and `scaling·(g·factor) ∘ mask` where there is a
    factor.
    """
    (rows, columns), rank = x.shape, g.shape[1]
    padded = _padded(rank)
    tile = TILES[x.itemsize][padded][1]
    blocks = _blocks(columns, tile.columns)
    parts, share = _parts(blocks, rows, tile.rows, x.device)
    sums = _sums(parts, (columns, rank) if transposed else (rank, columns), dtype, x.device)
    start = None if factor is None else torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    seed, dropped = _drop(dropout)
    strides = (*((0, 0) if factor is None else factor.stride()), *((1, rank) if transposed else (columns, 1)))
    kernels.across[blocks, parts](
        g, x, factor, sums, start, seed, rows, columns, rank, g.stride(0), *x.stride(), *strides, scaling,
        share, dropped,
        R=padded, START=factor is not None, DROP=dropout is not None, PRECISION="ieee", **_options(tile),
    )  # fmt: skip
    return _added(sums, dtype), start


def _both(dy: Tensor, up: Tensor, u: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """`dy·B`, `(M, r)`, and `scaling·dyᵀ·u`, `(out, r)`."""
    (rows, columns), rank = dy.shape, up.shape[1]
    tile = BOTH[dy.itemsize]
    blocks = _blocks(rows, tile.rows)
    parts, share = _parts(blocks, columns, tile.columns, dy.device)
    du = torch.empty(parts, rows, rank, dtype=torch.float32, device=dy.device)
    d_up = torch.empty(blocks, columns, rank, dtype=torch.float32, device=dy.device)
    kernels.both[blocks, parts](
        dy, up, u, du, d_up, rows, columns, rank, *dy.stride(), up.stride(1), up.stride(0), u.stride(0),
        scaling, share,
        R=_padded(rank), PRECISION="ieee", **_options(tile),
    )  # fmt: skip
    return _added(du, dy.dtype), _added(d_up, up.dtype)
