"""The Triton kernels of the skinny passes: each reads or writes one large matrix once, and sums in float32.

`rank` columns or rows of the small matrices lie in a tile of `R`, the next power of two from 16 on. A sum is
cut into parts of `share` elements, a program each, and `add` adds the parts' sums in one order, so that
results repeat to the bit. Offsets have 64 bits. Factors wider than `x` meet it as the narrow value and the
rest: `x` is not widened.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

ROUNDS = tl.constexpr(7)
"""Of Philox: the fewest with which it passes the statistical tests of its paper (Salmon et al. 2011), which
are BigCrush's.
"""
REST = tl.constexpr(2048.0)
"""What the rest of a split value is multiplied by, so that float16, whose smallest normal number is 2⁻¹⁴,
holds it in full.
"""


@triton.jit
def product(left, right, total, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """`total + left·right` in float32.

    `UPCAST` is for Triton's interpreter, whose products of bfloat16 are wrong.
    """
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def is_kept(seed, dropped, rows, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether dropout keeps each element of `rows` and the columns from `first`, a multiple of 8, on.

    A function of the seed, the row and the column alone: eight neighbours in a row take the 16-bit halves of
    the four words that Philox makes of (column // 8, row), and the element is dropped if its half is less
    than `dropped`.
    """
    zeros = tl.zeros([ROWS, COLUMNS // 8], tl.int32)
    groups = (first // 8 + tl.arange(0, COLUMNS // 8))[None, :] + zeros
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed), groups, rows.to(tl.int32)[:, None] + zeros, zeros, zeros, ROUNDS
    )
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLUMNS // 2))
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, COLUMNS))
    return halves.to(tl.int32) >= dropped


@triton.jit
def down(
    x, factor, u, seed, rows, columns, rank, x_row, x_column, factor_rank, factor_column, share, dropped,
    M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, DROP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`u[part, row, rank] = Σ (x ∘ mask)[row, column] · factor[rank, column]` over the columns of the
    part.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    m = (block * M + tl.arange(0, M)).to(tl.int64)
    r = tl.arange(0, R)
    total = tl.zeros([M, R], tl.float32)
    rest = tl.zeros([M, R], tl.float32)
    for first in range(part * share, tl.minimum(part * share + share, columns), K):
        k = (first + tl.arange(0, K)).to(tl.int64)
        xs = tl.load(
            x + m[:, None] * x_row + k[None, :] * x_column, (m < rows)[:, None] & (k < columns)[None, :], 0.0
        )
        inside = (k < columns)[:, None] & (r < rank)[None, :]
        factors = tl.load(factor + k[:, None] * factor_column + r[None, :] * factor_rank, inside, 0.0)
        if DROP:
            xs = tl.where(is_kept(seed, dropped, m, first, M, K), xs, 0.0)
        values = factors.to(xs.dtype)
        total = product(xs, values, total, UPCAST, PRECISION)
        if SPLIT:
            rests = ((factors - values.to(tl.float32)) * REST).to(xs.dtype)
            rest = product(xs, rests, rest, UPCAST, PRECISION)
    if SPLIT:
        total += rest * (1 / REST)
    out = u + part.to(tl.int64) * rows * rank + m[:, None] * rank + r[None, :]
    tl.store(out, total.to(u.dtype.element_ty), (m < rows)[:, None] & (r < rank)[None, :])


@triton.jit
def up(
    u, factor, bias, y, seed, rows, columns, rank, u_row, factor_rank, factor_column, scaling, dropped,
    M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`y[row, column] = scaling · Σ u[row, rank] · factor[rank, column] + bias[column]`, or nought where
    dropout drops.
    """
    m = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    first = tl.program_id(1) * K
    k = (first + tl.arange(0, K)).to(tl.int64)
    ys = tl.zeros([M, K], tl.float32)
    for low in range(0, rank, R):
        r = low + tl.arange(0, R)
        us = tl.load(u + m[:, None] * u_row + r[None, :], (m < rows)[:, None] & (r < rank)[None, :], 0.0)
        inside = (r < rank)[:, None] & (k < columns)[None, :]
        factors = tl.load(factor + r[:, None] * factor_rank + k[None, :] * factor_column, inside, 0.0)
        ys = product(us, factors, ys, UPCAST, PRECISION)
    ys = scaling * ys
    if BIAS:
        ys += tl.load(bias + k, k < columns, 0.0).to(tl.float32)[None, :]
    if DROP:
        ys = tl.where(is_kept(seed, dropped, m, first, M, K), ys, 0.0)
    tl.store(
        y + m[:, None] * columns + k[None, :],
        ys.to(y.dtype.element_ty),
        (m < rows)[:, None] & (k < columns)[None, :],
    )


@triton.jit
def across(
    g, x, factor, out, start, seed, rows, columns, rank, g_row, x_row, x_column, factor_rank, factor_column,
    out_rank, out_column,
    scaling, share, dropped,
    M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, START: tl.constexpr, DROP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`out[part, rank, column] = scaling · Σ g[row, rank] · (x ∘ mask)[row, column]` over the rows of the
    part.

    With `START` in the same pass `start = scaling · (g · factor) ∘ mask`, of the shape of `x`.
    """
    first = tl.program_id(0) * K
    part = tl.program_id(1)
    k = (first + tl.arange(0, K)).to(tl.int64)
    r = tl.arange(0, R)
    total = tl.zeros([K, R], tl.float32)
    if START:
        held = (r < rank)[:, None] & (k < columns)[None, :]
        factors = tl.load(factor + r[:, None] * factor_rank + k[None, :] * factor_column, held, 0.0).to(
            x.dtype.element_ty
        )
    for top in range(part * share, tl.minimum(part * share + share, rows), M):
        m = (top + tl.arange(0, M)).to(tl.int64)
        inside = (m < rows)[:, None] & (k < columns)[None, :]
        xs = tl.load(x + m[:, None] * x_row + k[None, :] * x_column, inside, 0.0)
        gs = tl.load(g + m[:, None] * g_row + r[None, :], (m < rows)[:, None] & (r < rank)[None, :], 0.0).to(
            xs.dtype
        )
        if DROP:
            kept = is_kept(seed, dropped, m, first, M, K)
            xs = tl.where(kept, xs, 0.0)
        total = product(tl.trans(xs), gs, total, UPCAST, PRECISION)
        if START:
            cs = scaling * product(gs, factors, tl.zeros([M, K], tl.float32), UPCAST, PRECISION)
            if DROP:
                cs = tl.where(kept, cs, 0.0)
            tl.store(start + m[:, None] * columns + k[None, :], cs.to(start.dtype.element_ty), inside)
    place = out + part.to(tl.int64) * rank * columns + r[None, :] * out_rank + k[:, None] * out_column
    tl.store(place, (scaling * total).to(out.dtype.element_ty), (k < columns)[:, None] & (r < rank)[None, :])


@triton.jit
def both(
    dy, factor, u, du, d_factor, rows, columns, rank, dy_row, dy_column, factor_rank, factor_column, u_row,
    scaling, share,
    M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass of `dy (rows, columns)` for `du[part] = dy · factor`, over the columns of the part, and for
    `d_factor[block] = scaling · dyᵀ · u`, over the rows of the block. `factor` is `(columns, rank)`, `u` is
    `(rows, rank)`.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    m = (block * M + tl.arange(0, M)).to(tl.int64)
    r = tl.arange(0, R)
    small = (m < rows)[:, None] & (r < rank)[None, :]
    us = tl.load(u + m[:, None] * u_row + r[None, :], small, 0.0).to(dy.dtype.element_ty)
    total = tl.zeros([M, R], tl.float32)
    for first in range(part * share, tl.minimum(part * share + share, columns), K):
        k = (first + tl.arange(0, K)).to(tl.int64)
        ys = tl.load(
            dy + m[:, None] * dy_row + k[None, :] * dy_column,
            (m < rows)[:, None] & (k < columns)[None, :],
            0.0,
        )
        inside = (k < columns)[:, None] & (r < rank)[None, :]
        factors = tl.load(factor + k[:, None] * factor_column + r[None, :] * factor_rank, inside, 0.0).to(
            ys.dtype
        )
        total = product(ys, factors, total, UPCAST, PRECISION)
        other = scaling * product(tl.trans(ys), us, tl.zeros([K, R], tl.float32), UPCAST, PRECISION)
        tl.store(
            d_factor + block.to(tl.int64) * columns * rank + k[:, None] * rank + r[None, :], other, inside
        )
    tl.store(du + part.to(tl.int64) * rows * rank + m[:, None] * rank + r[None, :], total, small)


@triton.jit
def add(parts, out, count, size, BLOCK: tl.constexpr):
    """`out = Σ parts[part]` over `count` parts of `size` float32 elements, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(count):
        total += tl.load(parts + tl.cast(part, tl.int64) * size + at, at < size, 0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), at < size)


@triton.jit
def mask(out, seed, rows, columns, dropped, M: tl.constexpr, K: tl.constexpr):
    """What dropout keeps, as one byte an element."""
    m = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    first = tl.program_id(1) * K
    k = first + tl.arange(0, K)
    kept = is_kept(seed, dropped, m, first, M, K)
    tl.store(
        out + m[:, None] * columns + k[None, :],
        kept.to(tl.int8),
        (m < rows)[:, None] & (k < columns)[None, :],
    )
