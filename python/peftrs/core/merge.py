"""Merging adapters into the weights of layers, and taking them out again to the bit: one transaction over a
list of layers.

Merging further adapters starts again from the original bits, so that `merge(a); merge(b)` equals `merge([a,
b])`. How a layer's base stores a changed map, and what takes it out again, is the base's own
(`peftrs.bases.store`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from peftrs.bases.dense import LINEAR
from peftrs.bases.kinds import Affine, Deferred
from peftrs.bases.quantized import Quantized
from peftrs.bases.sharded import whole
from peftrs.bases.store import Change, Replaced, Undo, Written, widen, wider
from peftrs.core import rounding
from peftrs.core.fold import Chain, fold, terms_of
from peftrs.core.frozen import Frozen, Ledger, Original, Shared
from peftrs.errors import MergeError, PeftrsWarning


@dataclass(frozen=True)
class Merge:
    """What is to be merged into one layer: all its adapters then, and those that are merged already."""

    frozen: Frozen
    names: tuple[str, ...]
    """In the order in which they are active, from which the chain follows."""
    chain: Chain
    earlier: Chain = ()

    def change(self) -> Change:
        """What the adapters together do to the layer."""
        tensors = {f"{one.name}: {slot}": one[slot] for one in self.chain for slot, _ in one.parameters()}
        names = tuple(adapter.name for adapter in self.chain)
        return Change(self.frozen.spec.name, names, partial(fold, self.chain), terms_of(self.chain), tensors)


Track = Callable[[list[Merge]], Iterable[Merge]]
"""What goes through a list of layers as it is, for instance to show progress."""


@torch.no_grad()
def merge(
    merges: Sequence[Merge],
    *,
    keep: bool = True,
    dtype: torch.dtype | None = None,
    track: Track = iter,
    model: nn.Module | None = None,
) -> None:
    """Merges adapters into all of these layers, or into none.

    Quantized layers are quantized again, which tells what that loses and is refused where most would be lost;
    with `dtype` they become dense ones for good, others get it where it is wider than their own. Without
    `keep` the merge is for good: only what no check can foresee fails then (an interrupt, the end of memory),
    and merging again finishes the work. Weights that other modules of `model` share are copied, with the
    bytes told; unmerging ties them again. Raises `MergeError`.
    """
    for one in merges:
        with one.frozen.at_hand():
            _check(one, keep=keep, dtype=dtype)
    shared = {one.frozen: one.frozen.ledger.shared for one in merges if one.frozen.ledger is not None}
    if model is not None:
        shared |= _found_shared(model, [one.frozen for one in merges if one.frozen.ledger is None])
    coarse = [one for one in merges if one.frozen.base.quantized]
    if not keep and dtype is None:
        # Quantized twice over, so that at no time all layers are there as they were and as they are to be.
        rounding.judge(
            [
                cast(Quantized, one.frozen.base).requantize(_before(one.frozen), one.change())[1]
                for one in coarse
            ]
        )
    # Quantized layers first: what rounding loses is known before a layer is changed for good.
    waiting = [*coarse, *(one for one in merges if not one.frozen.base.quantized)]
    done: list[Merge] = []
    try:
        for one in track(waiting):
            done.append(one)
            _store(one, shared.get(one.frozen, ()), keep=keep, dtype=dtype)
            if len(done) == len(coarse):
                _judge(coarse)
    except BaseException:
        for one in done:
            _take_back(one, shared.get(one.frozen, ()))
        raise


def _check(one: Merge, *, keep: bool, dtype: torch.dtype | None) -> None:
    frozen = one.frozen
    for adapter in one.chain:
        if fault := adapter.method.unmergeable(adapter):
            raise MergeError(f"{frozen.spec.name}: adapter {adapter.name!r} cannot be merged: {fault}")
    if frozen.ledger is not None:
        _undo(frozen, frozen.ledger)
    frozen.base.check(_before(frozen), one.change(), keep=keep, dtype=dtype)


def _store(one: Merge, shared: tuple[Shared, ...], *, keep: bool, dtype: torch.dtype | None) -> None:
    frozen = one.frozen
    with frozen.at_hand(write=True):
        if frozen.ledger is not None:
            _restore(frozen, frozen.ledger)
        if dtype is not None and frozen.base.quantized:
            frozen.module = cast(Quantized, frozen.base).widened(frozen.module, one.change(), dtype)
            frozen.base = LINEAR
            frozen.record(Ledger(one.names, None))
            return
        widen(frozen.stored, dtype)
        for held in shared:
            was = held.original.parameter
            setattr(
                held.owner,
                held.attribute,
                nn.Parameter(was.detach().clone(), requires_grad=was.requires_grad),
            )
        try:
            kept = {*range(len(frozen.stored))} - {held.at for held in shared} if keep else set[int]()
            frozen.module, undo = frozen.base.store(frozen.module, one.change(), kept)
        except BaseException:
            _share_again(shared)
            raise
        frozen.record(Ledger(one.names, undo if keep else None, shared))


def _take_back(one: Merge, shared: tuple[Shared, ...]) -> None:
    """Makes a layer what it was before the transaction, unless it was merged for good."""
    ledger = one.frozen.ledger
    if ledger is not None and ledger.undo is None:
        return
    if ledger is not None:
        unmerge(one.frozen)
    if one.earlier:
        held = {adapter.name for adapter in one.earlier}
        names = tuple(name for name in one.names if name in held)
        _store(replace(one, names=names, chain=one.earlier), shared, keep=True, dtype=None)


@torch.no_grad()
def unmerge(frozen: Frozen) -> None:
    """Restores a layer's original bits, in the dtype that the layer has now. Warns if nothing is merged.

    Weights that were changed since the merge cannot be restored: the adapters are subtracted from them, with
    a warning. Raises `MergeError` after a merge for good.
    """
    if frozen.ledger is None:
        warnings.warn(f"{frozen.spec.name}: nothing is merged, nothing to do", PeftrsWarning, 4)
        return
    with frozen.at_hand(write=True):
        _restore(frozen, frozen.ledger)


def _restore(frozen: Frozen, ledger: Ledger) -> None:
    frozen.module, exact = frozen.base.restore(frozen.module, _undo(frozen, ledger))
    if not exact:
        text = (
            f"{frozen.spec.name}: the weights were changed since the merge; the adapters are subtracted from"
            " them, which does not restore every bit"
        )
        warnings.warn(text, PeftrsWarning, 5)
    _share_again(ledger.shared)
    frozen.record(None)


def _undo(frozen: Frozen, ledger: Ledger) -> Undo:
    if ledger.undo is None:
        raise MergeError(
            f"{frozen.spec.name}: {list(ledger.names)} were merged for good, and the originals were not kept;"
            " hint: call merge_and_unload again to finish what was broken off"
        )
    return ledger.undo


def is_rounded_twice(frozen: Frozen, dtype: torch.dtype | None) -> bool:
    """Whether what is merged was rounded to a coarser dtype than `dtype`, and the layer's originals are
    there.
    """
    if dtype is None or frozen.ledger is None or frozen.ledger.undo is None:
        return False
    return frozen.base.quantized or any(wider(one, dtype) is not one.dtype for one in frozen.stored)


def _judge(merges: Sequence[Merge]) -> None:
    """Tells what rounding did to the updates of layers that are merged.

    Raises `MergeError` if most of them is lost.
    """
    undone = [one.frozen.ledger.undo for one in merges if one.frozen.ledger is not None]
    rounding.judge([undo.loss for undo in undone if isinstance(undo, Replaced)])


def _before(frozen: Frozen) -> nn.Module:
    """The frozen layer, the one from before a merge where another has taken its place."""
    undo = None if frozen.ledger is None else frozen.ledger.undo
    return undo.module if isinstance(undo, Replaced) else frozen.module


@torch.no_grad()
def originals(frozen: Frozen) -> list[Tensor]:
    """The layer's weight and, if it has one, bias, as they are stored without what is merged."""
    ledger = frozen.ledger
    with frozen.at_hand():
        found = frozen.base.original(frozen.module, None if ledger is None else _undo(frozen, ledger))
    for held in () if ledger is None else ledger.shared:
        found[held.at] = held.original.parameter
    return found


def presented(frozen: Frozen, device: torch.device) -> Affine:
    """The whole layer as an affine map without what is merged, computed and brought to `device` where it is
    read.
    """

    def brought() -> Affine:
        with frozen.at_hand():
            weight, *bias = (whole(tensor).to(device) for tensor in originals(frozen))
        return Affine(weight.mT if frozen.base.transposed else weight, bias[0] if bias else None)

    return cast(Affine, Deferred(brought))


def before_cast(frozen: Frozen, cast: Callable[[Tensor], Tensor]) -> None:
    """Makes ready for `cast`, to be applied to the layer's tensors: bits that it loses and that nobody else
    holds are kept.
    """
    ledger = frozen.ledger
    if ledger is None:
        return
    if isinstance(ledger.undo, Written):
        frozen.record(replace(ledger, undo=ledger.undo.before_cast(frozen.stored, cast)))
    for held in ledger.shared:
        # Several layers may hold it: a second cast to the same dtype and device changes nothing.
        held.original._apply(cast)  # type: ignore[no-untyped-call]


def _share_again(shared: tuple[Shared, ...]) -> None:
    for held in shared:
        setattr(held.owner, held.attribute, held.original.parameter)


def _found_shared(model: nn.Module, layers: Sequence[Frozen]) -> dict[Frozen, tuple[Shared, ...]]:
    """Those of these layers whose weight or bias other modules of the model hold too, with a warning of the
    bytes to copy.

    Raises `MergeError` for a layer that hangs in another place as well, unadapted: there its weight cannot be
    told apart.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, child in (*module._parameters.items(), *module._modules.items()):
            if child is not None:
                holders.setdefault(id(child), []).append((module, attribute))
    found: dict[Frozen, tuple[Shared, ...]] = {}
    kept: dict[int, Original] = {}
    for frozen in layers:
        inside, shared = set(frozen.module.modules()), []
        for at, parameter in enumerate(frozen.stored):
            owners = holders.get(id(parameter), [])
            for owner, attribute in (place for place in owners if place[0] in inside):
                parents = [parent for parent, _ in holders.get(id(owner), [])]
                if any(parent not in inside and parent._modules is not frozen.modules for parent in parents):
                    raise MergeError(
                        f"{frozen.spec.name}: the layer beneath hangs in another place of the model too,"
                        " which is not adapted and which merging would change; give that place a copy of the"
                        " layer"
                    )
                if len(owners) > 1 and not frozen.base.quantized:
                    original = kept.setdefault(id(parameter), Original(parameter))
                    shared.append(Shared(owner, attribute, original, at))
        if shared:
            found[frozen] = tuple(shared)
    copied = [held.original.parameter.nbytes for its in found.values() for held in its]
    if copied:
        text = (
            f"{len(copied)} tensors that other modules share are copied for the merge: {sum(copied):,} bytes"
        )
        warnings.warn(text, PeftrsWarning, 4)
    return found
