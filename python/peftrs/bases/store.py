"""How a changed map is stored in a layer, and what takes it out again to the bit.

Arithmetic: from the stored bits, in float32 (float64 where the weights are float32), over all that is merged,
then rounded once.

What is kept restores every bit even if the factors changed, were deleted, or the model moved to another
device: for a change of low rank, its factors and which weights subtracting it does not bring back
(`peftrs.ops.low_rank`); else the originals.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftrs.bases.kinds import Affine, Term
from peftrs.bases.sharded import alike, is_distributed, overwrite
from peftrs.errors import MergeError, PeftrsWarning, listed
from peftrs.ops.low_rank import NATIVE, Correction, Update, add_low_rank_, overflows

MOST = 0.5
"""Factors of so many bytes for each byte of weight are not kept for a correction, but the original is."""


@dataclass(frozen=True)
class Change:
    """A change of one layer's map that is to be stored."""

    layer: str
    adapters: tuple[str, ...]
    fold: Callable[[Affine], Affine]
    """The changed map, not rounded, for the frozen one."""
    terms: tuple[Term, ...] | None
    """All that the change is, where it is of low rank."""
    tensors: Mapping[str, Tensor]
    """The adapters' own, by adapter and slot."""

    def check_numbers(self) -> None:
        """Raises `MergeError` naming the adapters' tensors that hold what is no number."""
        broken = [name for name, tensor in self.tensors.items() if not bool(tensor.isfinite().all())]
        if broken:
            raise MergeError(
                f"{self.layer}: {listed(broken)} holds NaN or infinite values; the adapter seems to be broken"
            )

    def overflow(self, dtype: torch.dtype) -> MergeError:
        """The error for weights that would not be finite."""
        return MergeError(
            f"{self.layer}: merging {listed(list(self.adapters))} gives weights beyond {dtype}; hint: lower"
            " the adapter's scaling or merge into a wider dtype"
        )


class Layout(NamedTuple):
    """How a layer stores its weight, seen from the presented one."""

    transposed: bool
    stacked: bool

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as a matrix, or a stack of such."""
        return weight if self.stacked else weight.flatten(1)


@dataclass(frozen=True)
class Rounding:
    """What a format made of an update `D` of one weight, as sums over its entries.

    `E` is the change that was stored.
    """

    layer: str
    format: str
    asked: float
    """`‖D‖²`"""
    along: float
    """`⟨D, E⟩`"""
    missed: float
    """`‖D - E‖²`"""

    @property
    def kept(self) -> float:
        """The share of the update that was stored: 1 all of it, 0 none."""
        return self.along / self.asked if self.asked else 1.0


@dataclass(frozen=True)
class Written:
    """What the stored tensors were, by their positions in `Base.stored`, where the merge changed them."""

    kept: dict[int, Tensor | Correction]
    layout: Layout

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        return sum(one.bytes if isinstance(one, Correction) else one.nbytes for one in self.kept.values())

    def restore(self, stored: Sequence[nn.Parameter]) -> bool:
        """Restores the bits in the dtype that the layer has now; returns False where that could not be done
        exactly.
        """
        exact = True
        for at, was in self.kept.items():
            parameter = stored[at].detach()
            if isinstance(was, Tensor):
                parameter.copy_(was)
                continue
            rows = self.layout.matrix(parameter)
            exact &= was.restore_(rows)
            if rows.data_ptr() != parameter.data_ptr():
                parameter.copy_(rows.view(parameter.shape))
        return exact

    def original(self, stored: Sequence[nn.Parameter], at: int) -> Tensor:
        """One of the stored tensors as it was, left as it is."""
        now, was = stored[at], self.kept.get(at)
        if not isinstance(was, Correction):
            return now if was is None else was
        copy = now.detach().to(was.dtype, copy=True, memory_format=torch.contiguous_format)
        was.restore_(self.layout.matrix(copy))
        return copy

    def before_cast(self, stored: Sequence[nn.Parameter], cast: Callable[[Tensor], Tensor]) -> Written:
        """The same with originals for corrections, if `cast`, to be applied to the tensors, changes their
        dtype: it loses bits.
        """
        corrected = [at for at, was in self.kept.items() if isinstance(was, Correction)]
        if all(cast(stored[at].detach().flatten()[:0]).dtype is stored[at].dtype for at in corrected):
            return self
        return Written(self.kept | {at: self.original(stored, at) for at in corrected}, self.layout)


@dataclass(frozen=True)
class Replaced:
    """The layer from before, whose place one with other weights has taken, and what rounding did to the
    change.
    """

    module: nn.Module
    loss: Rounding

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        return sum(one.nbytes for one in (*self.module.parameters(), *self.module.buffers()))


Undo = Written | Replaced


def check(
    stored: Sequence[nn.Parameter], change: Change, layout: Layout, *, keep: bool, dtype: torch.dtype | None
) -> None:
    """Raises `MergeError` for tensors that hold what is no number, and for weights that would not be finite.

    Those are found if the change is of low rank, or if nothing is kept by which the merge could be taken
    back. `dtype` is what the model gets afterwards, if that is not its own.
    """
    update = low_rank(stored[0], change, layout)
    if update is None or not isfinite(update.reach):
        change.check_numbers()
    if update is not None:
        weight = stored[0].detach()
        if overflows(layout.matrix(weight).to(dtype or weight.dtype), update):
            raise change.overflow(dtype or weight.dtype)
    elif not keep:
        folded(stored, change, layout, dtype)


def wider(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that holds all numbers of the tensor's own and of another one, if there is one."""
    spread = is_distributed(tensor) or not tensor.is_floating_point()
    return tensor.dtype if dtype is None or spread else torch.promote_types(tensor.dtype, dtype)


def widen(stored: Sequence[nn.Parameter], dtype: torch.dtype | None) -> None:
    """Gives stored tensors a dtype that is wider than their own, so that what is merged is not rounded
    twice.
    """
    for parameter in stored:
        if (kind := wider(parameter, dtype)) is not parameter.dtype:
            parameter.data = parameter.data.to(kind)


def write(stored: Sequence[nn.Parameter], change: Change, layout: Layout, keep: Collection[int]) -> Written:
    """Changes the stored tensors, and returns what restores those whose positions are to be kept.

    Raises `MergeError`.
    """
    update = low_rank(stored[0], change, layout)
    if update is None:
        kept: dict[int, Tensor | Correction] = {at: stored[at].detach().clone() for at in keep}
        for parameter, value in zip(stored, folded(stored, change, layout), strict=True):
            overwrite(parameter.detach(), value)
        return Written(kept, layout)
    weight = stored[0].detach()
    corrected = weight.dtype in NATIVE and update.bytes < MOST * weight.nbytes
    kept = {} if corrected or 0 not in keep else {0: weight.clone()}
    finite, correction = add_low_rank_(layout.matrix(weight), update, corrected and 0 in keep)
    if correction is not None:
        kept[0] = correction
    if not finite:
        _tell_not_finite(change)
    return Written(kept, layout)


def folded(
    stored: Sequence[nn.Parameter], change: Change, layout: Layout, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """What the stored tensors are to be, rounded once.

    Raises `MergeError` where they are not finite though they were before.
    """
    # Where processes share the layer out, all that is computed with must be shared out, or all of it be
    # whole.
    now = [alike(tensor, list(change.tensors.values())) for tensor in stored]
    wide = torch.float64 if now[0].dtype in (torch.float32, torch.float64) else torch.float32
    bias = now[1].to(wide) if len(now) > 1 else None
    affine = change.fold(Affine((now[0].mT if layout.transposed else now[0]).to(wide), bias))
    weight = affine.weight.mT if layout.transposed else affine.weight
    values = [weight] if bias is None or affine.bias is None else [weight, affine.bias]
    values = [value.to(dtype or parameter.dtype) for parameter, value in zip(now, values, strict=True)]
    if not all(bool(value.isfinite().all()) for value in values):
        if any(
            bool((was.isfinite() & ~value.isfinite()).any()) for was, value in zip(now, values, strict=True)
        ):
            raise change.overflow(dtype or now[0].dtype)
        _tell_not_finite(change)
    return values


def low_rank(weight: nn.Parameter, change: Change, layout: Layout) -> Update | None:
    """The change of the stored weight, if it is of low rank, leaves the bias alone, and can be added in
    place.
    """
    terms = change.terms
    if terms is None or any(term.shift is not None for term in terms) or not weight.dtype.is_floating_point:
        return None
    if any(map(is_distributed, (weight, *change.tensors.values()))) or not weight.is_contiguous():
        return None
    if len(terms) == 1:
        (term,) = terms
        update = Update(term.up, term.down, float(term.scale))
    else:
        dtype = torch.float64 if weight.dtype is not torch.bfloat16 else torch.float32
        ups = [term.up.to(dtype) * float(term.scale) for term in terms]
        update = Update(torch.cat(ups, -1), torch.cat([term.down.to(dtype) for term in terms], -2), 1.0)
    return update.transposed() if layout.transposed else update


def _tell_not_finite(change: Change) -> None:
    text = f"{change.layer}: some weights were infinite or NaN before the merge and are so still"
    warnings.warn(text, PeftrsWarning, 4)
