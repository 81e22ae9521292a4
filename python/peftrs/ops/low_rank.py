"""weight += scaling * up @ down in place, rounded once: the Rust kernel on CPU tensors, blocks of rows in
torch elsewhere.

A correction takes it out again to the bit: the kernel subtracts the same update, which is the same to the bit
whatever the machine, and the correction has, for the few weights that this does not bring back, how many
steps they are off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from peftrs import _native
from peftrs.dtype import FLOATS, NAMES

ROWS = 256
"""Rows a block in torch: the wide copy of a block stays small beside the weight (256 rows of 14,336 are 14 MB
in float32).
"""

NATIVE = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float32}
"""The weight dtypes that the Rust kernel takes, with the dtype in which it accumulates."""


@dataclass(frozen=True)
class Update:
    """`scaling * up @ down`: `up` is `(rows, r)`, `down` `(r, columns)`, of any strides, or stacks of
    such.
    """

    up: Tensor
    down: Tensor
    scaling: float

    @property
    def bytes(self) -> int:
        """How much memory the factors take."""
        return self.up.nbytes + self.down.nbytes

    def transposed(self) -> Update:
        """The same for a weight stored the other way round."""
        return Update(self.down.mT, self.up.mT, self.scaling)

    def copied(self) -> Update:
        """A copy on the CPU."""
        up, down = (factor.detach().to("cpu", copy=True) for factor in (self.up, self.down))
        return Update(up, down, self.scaling)

    def matrices(self) -> Iterator[Update]:
        """The update of each matrix of a stack, or of the only one."""
        for up, down in zip(matrices(self.up), matrices(self.down), strict=True):
            yield Update(up, down, self.scaling)

    @cached_property
    def reach(self) -> float:
        """What no element of the update exceeds in magnitude, but for rounding; not finite if a factor is
        not.
        """
        if not (self.up.numel() and self.down.numel()):
            return 0.0
        return abs(self.scaling) * self.up.shape[-1] * _largest(self.up) * _largest(self.down)


@dataclass(frozen=True)
class Correction:
    """What takes an update out of a weight of this dtype again: the update, and a code for each matrix of the
    stack.
    """

    update: Update
    dtype: torch.dtype
    codes: tuple[bytes, ...]

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        return self.update.bytes + sum(len(code) for code in self.codes)

    @torch.no_grad()
    def restore_(self, weight: Tensor) -> bool:
        """Makes a merged weight, on any device, what it was. Returns whether it is that to the bit.

        It is not where the weight was changed since it was merged: there, the update is subtracted.
        """
        here = weight.detach().to("cpu", self.dtype).contiguous()
        each = zip(matrices(here), self.update.matrices(), self.codes, strict=True)
        exact = [_native.restore_low_rank(_given(one), _update(update), code) for one, update, code in each]
        if here.data_ptr() != weight.data_ptr():
            weight.copy_(here)
        torch.autograd.graph.increment_version(weight)
        return all(exact)


@torch.no_grad()
def add_low_rank_(weight: Tensor, update: Update, keep: bool = False) -> tuple[bool, Correction | None]:
    """Adds an update to a contiguous weight, or a stack of such, in place: accumulates wide, rounds once.

    Returns whether all weights are finite then, and with `keep` what takes the update out again.
    """
    if keep and weight.dtype not in NATIVE:
        raise TypeError(f"no correction is made for weights of {weight.dtype}")
    update = Update(_factor(update.up, weight), _factor(update.down, weight), update.scaling)
    native = _kernel_takes(weight)
    add = _add_native if native else _add_blocks
    done = [add(one, its, keep) for one, its in zip(matrices(weight), update.matrices(), strict=True)]
    if native:
        torch.autograd.graph.increment_version(weight)
    codes = tuple(code for _, code in done if code is not None)
    return all(finite for finite, _ in done), Correction(
        update.copied(), weight.dtype, codes
    ) if keep else None


@torch.no_grad()
def overflows(weight: Tensor, update: Update) -> bool:
    """Whether the update would make a finite weight infinite; nothing is changed."""
    kind = torch.finfo(weight.dtype)
    # What is less than half of a step at the end of the range rounds to no larger number there; twice that is
    # left as margin.
    if update.reach < kind.max * kind.eps / 8:
        return False
    return any(
        bool((block.isfinite() & ~total.to(weight.dtype).isfinite()).any())
        for one, its in zip(matrices(weight), update.matrices(), strict=True)
        for block, total in _blocks(one, its)
    )


def matrices(tensor: Tensor) -> tuple[Tensor, ...]:
    """The matrices of a stack, or the only one."""
    return tensor.unbind() if tensor.ndim == 3 else (tensor,)


def _kernel_takes(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in NATIVE


def _add_native(weight: Tensor, update: Update, keep: bool) -> tuple[bool, bytes | None]:
    return _native.add_low_rank(_given(weight), _update(update), keep)


def _add_blocks(weight: Tensor, update: Update, keep: bool) -> tuple[bool, bytes | None]:
    original = weight.to("cpu", copy=True) if keep else None
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    for block, total in _blocks(weight, update):
        block.copy_(total)
        finite &= block.isfinite().all()
    if original is None:
        return bool(finite), None
    # Held by name: the kernel is given addresses.
    merged, its = weight.to("cpu"), update.copied()
    return bool(finite), _native.correct_low_rank(_given(original), _given(merged), _update(its))


def _blocks(weight: Tensor, update: Update) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of some rows of a matrix at a time, each with its rows after the update, not rounded yet."""
    wide = NATIVE.get(weight.dtype, torch.float64) if weight.device.type != "mps" else torch.float32
    up, down = update.up.to(wide), update.down.to(wide)
    for start in range(0, weight.shape[0], ROWS):
        block = weight[start : start + ROWS]
        yield block, torch.addmm(block.to(wide), up[start : start + ROWS], down, alpha=update.scaling)


def _largest(factor: Tensor) -> float:
    """The largest magnitude.

    On the CPU it is not torch that looks, whose threads would spin on while the kernel's want to work.
    """
    if factor.device.type == "cpu" and factor.dtype in FLOATS:
        return max(_native.largest_magnitude(_given(matrix)) for matrix in matrices(factor.detach()))
    return max(map(abs, map(float, torch.aminmax(factor))))


def _factor(factor: Tensor, weight: Tensor) -> Tensor:
    return factor.detach().to(weight.device, factor.dtype if factor.dtype in FLOATS else torch.float32)


_Given = tuple[int, str, tuple[int, int], tuple[int, int]]


def _given(matrix: Tensor) -> _Given:
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    return matrix.data_ptr(), NAMES[matrix.dtype], (rows, columns), (down, right)


def _update(update: Update) -> tuple[_Given, _Given, float, int]:
    return _given(update.up), _given(update.down), update.scaling, torch.get_num_threads()
