"""Merging adapters into the weights of a layer, and taking them out again to the bit.

Arithmetic: from the stored bits, in float32 (float64 where the weights are float32), over all merged
adapters, then rounded once. Merging further adapters starts again from the original bits, so that `merge(a);
merge(b)` equals `merge([a, b])`.

The ledger keeps what restores every bit even if the factors changed, were deleted, or the model moved to
another device: for a change of low rank, its factors and which weights subtracting it does not bring back
(`peftrs.ops.low_rank`); else the originals. A layer that is quantized gets another in its place
(`peftrs.core.rounding`), and the ledger keeps the one from before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from peftrs.bases.kinds import Affine, Deferred
from peftrs.bases.quantized import Quantized
from peftrs.bases.sharded import alike, is_distributed, overwrite, whole
from peftrs.core import rounding
from peftrs.core.method import Additive
from peftrs.errors import MergeError, PeftrsWarning, listed
from peftrs.ops.low_rank import NATIVE, Correction, Update, add_low_rank_, overflows

if TYPE_CHECKING:
    from peftrs.core.fold import Chain
    from peftrs.core.layer import AdaptedLayer


MOST = 0.5
"""Factors of so many bytes for each byte of weight are not kept for a correction, but the original is."""


@dataclass(frozen=True)
class Shared:
    """A weight or bias that other modules hold too, and where the layer to be merged holds it."""

    owner: nn.Module
    attribute: str
    parameter: nn.Parameter
    at: int
    """Its position in `stored`."""


@dataclass(frozen=True)
class Ledger:
    """What it takes to undo a merge: the names, in the order in which they are active, and what the stored
    tensors were.

    `kept` goes by the position in `stored`, where the merge changed it; None after a merge for good. What was
    shared is kept as it was, and the layer has its own while merged.
    """

    names: tuple[str, ...]
    kept: dict[int, Tensor | Correction] | None
    shared: tuple[Shared, ...] = ()
    layer: nn.Module | None = None
    """The frozen layer itself from before, where it is quantized and `kept` is empty."""
    rounding: rounding.Rounding | None = None

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        held = (
            0
            if self.layer is None
            else sum(one.nbytes for one in (*self.layer.parameters(), *self.layer.buffers()))
        )
        return held + sum(
            one.bytes if isinstance(one, Correction) else one.nbytes for one in (self.kept or {}).values()
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to merge in."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def names_to_merge(layer: AdaptedLayer, names: Sequence[str] | None) -> list[str]:
    """The adapters of a layer to merge that are not merged yet: those named, else the active ones."""
    if isinstance(names, str):
        raise TypeError(f"adapter_names must be a list of names, not the string {names!r}")
    wanted = layer.active_adapters if names is None else names
    return [name for name in wanted if name in layer.adapters and name not in layer.merged_adapters]


@torch.no_grad()
def merge(
    layer: AdaptedLayer,
    names: Sequence[str],
    shared: tuple[Shared, ...] = (),
    *,
    keep: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Merges the named adapters into a layer, beside those merged already; without `keep` for good.

    A quantized layer is quantized again, or with `dtype` becomes a dense one for good; another gets a dtype
    that is wider than its own. What `check` lets pass is assumed. Raises `MergeError`, changing nothing.
    """
    if names:
        layer.activation.merged = True
        with layer.at_hand(write=True):
            _merge(layer, names, shared, keep=keep, dtype=dtype)


def _merge(
    layer: AdaptedLayer,
    names: Sequence[str],
    shared: tuple[Shared, ...],
    *,
    keep: bool,
    dtype: torch.dtype | None,
) -> None:
    # In the order of activation, from which the chain follows: an order taken from the chain would be turned
    # round once more.
    earlier = layer.merged_adapters
    together = tuple(dict.fromkeys([*earlier, *names]))
    chain = layer.chain(together)
    if rounding.coarse(layer):
        if dtype is not None:
            rounding.dequantize(layer, chain, dtype)
            layer.ledger = Ledger(together, None)
            return
        before = rounding.before(layer)
        layer.base_layer, lost = rounding.requantize(layer, chain)
        layer.ledger = Ledger(together, {}, layer=before, rounding=lost) if keep else Ledger(together, None)
        if not keep:
            cast(Quantized, layer.base).dropped(before)
        return
    if layer.ledger is not None:
        shared = layer.ledger.shared
        unmerge(layer)
    for one in shared:
        own = nn.Parameter(one.parameter.detach().clone(), requires_grad=one.parameter.requires_grad)
        setattr(one.owner, one.attribute, own)
    for parameter in stored(layer):
        if (wider := rounding.widened(parameter, dtype)) is not parameter.dtype:
            parameter.data = parameter.data.to(wider)
    try:
        kept = _write(
            layer, chain, {*range(len(stored(layer)))} - {one.at for one in shared} if keep else set()
        )
    except BaseException:
        _share_again(shared)
        merge(layer, earlier, shared)
        raise
    layer.ledger = Ledger(together, kept if keep else None, shared)


@torch.no_grad()
def unmerge(layer: AdaptedLayer) -> None:
    """Restores a layer's original bits, in the dtype that the layer has now. Warns if nothing is merged.

    Weights that were changed since the merge cannot be restored: the adapters are subtracted from them, with
    a warning. Raises `MergeError` after a merge for good.
    """
    if layer.ledger is None:
        warnings.warn(f"{layer.spec.name}: nothing is merged, nothing to do", PeftrsWarning, 4)
        return
    with layer.at_hand(write=True):
        _unmerge(layer, layer.ledger, _kept(layer))


def _unmerge(layer: AdaptedLayer, ledger: Ledger, kept: dict[int, Tensor | Correction]) -> None:
    if ledger.layer is not None:
        cast(Quantized, layer.base).dropped(layer.base_layer)
        layer.base_layer = ledger.layer.to(stored(layer)[0].device)
    for at, was in kept.items():
        parameter = stored(layer)[at].detach()
        if isinstance(was, Tensor):
            parameter.copy_(was)
            continue
        rows = _rows(layer, parameter)
        if not was.restore_(rows):
            warnings.warn(
                f"{layer.spec.name}: the weights were changed since the merge; the adapters are subtracted"
                " from them, which does not restore every bit",
                PeftrsWarning,
                4,
            )
        if rows.data_ptr() != parameter.data_ptr():
            parameter.copy_(rows.view(parameter.shape))
    _share_again(ledger.shared)
    layer.ledger = None


def judge(layers: Sequence[AdaptedLayer]) -> None:
    """Tells what rounding did to the updates of layers that are merged.

    Raises `MergeError` if most of them is lost.
    """
    rounding.judge(
        [one.ledger.rounding for one in layers if one.ledger is not None and one.ledger.rounding is not None]
    )


def unmerged(layer: AdaptedLayer) -> list[Tensor]:
    """The layer's weight and, if it has one, bias, as they are without what is merged."""
    if rounding.coarse(layer):
        return [one for one in layer.base.dense(rounding.before(layer)) if one is not None]
    with layer.at_hand():
        return [original(layer, at) for at in range(len(stored(layer)))]


def presented(layer: AdaptedLayer, device: torch.device) -> Affine:
    """The whole layer as an affine map without what is merged, computed and brought to `device` where it is
    read.
    """

    def brought() -> Affine:
        with layer.at_hand():
            weight, *bias = (whole(tensor).to(device) for tensor in unmerged(layer))
        transposed = layer.base.transposed and not rounding.coarse(layer)
        return Affine(weight.mT if transposed else weight, bias[0] if bias else None)

    return cast(Affine, Deferred(brought))


@torch.no_grad()
def original(layer: AdaptedLayer, at: int) -> Tensor:
    """One of the stored tensors, by its position, as it is without what is merged."""
    if rounding.coarse(layer):
        return unmerged(layer)[at]
    with layer.at_hand():
        now = stored(layer)[at]
        return now if layer.ledger is None else _original(layer, at, now)


def _original(layer: AdaptedLayer, at: int, now: Tensor) -> Tensor:
    ledger = cast(Ledger, layer.ledger)
    shared = [one.parameter for one in ledger.shared if one.at == at]
    was = _kept(layer).get(at, now)
    if isinstance(was, Correction):
        copy = now.detach().to(was.dtype, copy=True, memory_format=torch.contiguous_format)
        was.restore_(_rows(layer, copy))
        return copy
    return shared[0] if shared else was


def before_cast(layer: AdaptedLayer, cast: Callable[[Tensor], Tensor]) -> None:
    """Keeps the originals of a merged layer if `cast`, to be applied to its tensors, changes their dtype and
    so loses bits.
    """
    if layer.ledger is None or layer.ledger.kept is None:
        return
    now, kept = stored(layer), layer.ledger.kept
    corrected = [at for at, was in kept.items() if isinstance(was, Correction)]
    if any(cast(now[at].detach().flatten()[:0]).dtype is not now[at].dtype for at in corrected):
        layer.ledger = replace(layer.ledger, kept=kept | {at: original(layer, at) for at in corrected})


def _kept(layer: AdaptedLayer) -> dict[int, Tensor | Correction]:
    if layer.ledger is None or layer.ledger.kept is None:
        raise MergeError(
            f"{layer.spec.name}: {layer.merged_adapters} were merged for good, and the originals were not"
            " kept; hint: call merge_and_unload again to finish what was broken off"
        )
    return layer.ledger.kept


def _share_again(shared: tuple[Shared, ...]) -> None:
    for one in shared:
        setattr(one.owner, one.attribute, one.parameter)


def _rows(layer: AdaptedLayer, weight: Tensor) -> Tensor:
    """The stored weight as a matrix, or a stack of such."""
    return weight if layer.spec.stacked else weight.flatten(1)


def stored(layer: AdaptedLayer) -> list[nn.Parameter]:
    """The layer's own weight and, if it has one, bias."""
    return [parameter for parameter in layer.base.parameters(layer.base_layer) if parameter is not None]


def shared_weights(
    model: nn.Module, layers: Sequence[AdaptedLayer]
) -> dict[AdaptedLayer, tuple[Shared, ...]]:
    """The layers among these, not merged yet, whose weight or bias other modules of the model hold too.

    Raises `MergeError` for a layer that hangs in another place as well, unadapted: there its weight cannot be
    told apart.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, held in (*module._parameters.items(), *module._modules.items()):
            if held is not None:
                holders.setdefault(id(held), []).append((module, attribute))
    found: dict[AdaptedLayer, tuple[Shared, ...]] = {}
    for layer in (layer for layer in layers if not layer.merged):
        inside = set(layer.modules())
        shared = []
        for at, parameter in enumerate(stored(layer)):
            places = holders.get(id(parameter), [])
            for owner, attribute in (place for place in places if place[0] in inside):
                if any(parent not in inside for parent, _ in holders.get(id(owner), [])):
                    raise MergeError(
                        f"{layer.spec.name}: the layer beneath hangs in another place of the model too, which"
                        " is not adapted and which merging would change; give that place a copy of the layer"
                    )
                if len(places) > 1 and not rounding.coarse(layer):
                    shared.append(Shared(owner, attribute, parameter, at))
        if shared:
            found[layer] = tuple(shared)
    return found


@torch.no_grad()
def check(layer: AdaptedLayer, chain: Chain, *, keep: bool = True, dtype: torch.dtype | None = None) -> None:
    """Raises `MergeError` for what can be known before a weight is touched: tensors that are not numbers,
    maps that do not fit.

    Weights that would not be finite are found here if the change is of low rank, or if nothing is to be kept
    by which the merge could be taken back.
    """
    with layer.at_hand():
        _check(layer, chain, keep=keep, dtype=dtype)


def _check(layer: AdaptedLayer, chain: Chain, *, keep: bool, dtype: torch.dtype | None) -> None:
    weight, _ = layer.base.parameters(layer.base_layer)
    update = low_rank(layer, chain)
    if update is None or not isfinite(update.reach):
        broken = [
            f"{a.name}: {slot}"
            for a in chain
            for slot, _ in a.parameters()
            if not bool(a[slot].isfinite().all())
        ]
        if broken:
            raise MergeError(
                f"{layer.spec.name}: {listed(broken)} holds NaN or infinite values; the adapter seems to be"
                " broken"
            )
    for adapter in chain:
        fault = adapter.method.unmergeable(adapter)
        if fault:
            raise MergeError(f"{layer.spec.name}: adapter {adapter.name!r} cannot be merged: {fault}")
    if rounding.coarse(layer):
        rounding.check(layer, chain, dtype)
        return
    if update is not None:
        if overflows(_rows(layer, weight.detach()).to(dtype or weight.dtype), update):
            raise _overflow(layer, chain, dtype)
    elif not keep:
        _folded(layer, chain, dtype)


def _overflow(layer: AdaptedLayer, chain: Chain, dtype: torch.dtype | None) -> MergeError:
    return MergeError(
        f"{layer.spec.name}: merging {listed([adapter.name for adapter in chain])} gives weights beyond "
        f"{dtype or stored(layer)[0].dtype}; lower the adapter's scaling or merge into a wider dtype"
    )


def _write(layer: AdaptedLayer, chain: Chain, keep: set[int]) -> dict[int, Tensor | Correction]:
    """Changes the stored tensors, and returns what restores those whose positions are to be kept."""
    now = stored(layer)
    update = low_rank(layer, chain)
    if update is None:
        kept: dict[int, Tensor | Correction] = {at: now[at].detach().clone() for at in keep}
        for parameter, value in zip(now, _folded(layer, chain), strict=True):
            overwrite(parameter.detach(), value)
        return kept
    weight = now[0].detach()
    corrected = weight.dtype in NATIVE and update.bytes < MOST * weight.nbytes
    kept = {} if corrected or 0 not in keep else {0: weight.clone()}
    finite, correction = add_low_rank_(_rows(layer, weight), update, corrected and 0 in keep)
    if correction is not None:
        kept[0] = correction
    if not finite:
        _tell_not_finite(layer)
    return kept


def _folded(layer: AdaptedLayer, chain: Chain, rounded: torch.dtype | None = None) -> list[Tensor]:
    """What the stored tensors are to be, rounded once. Raises `MergeError` where they are not finite though
    they were before.

    They are rounded to their own dtype unless told otherwise.
    """
    # Where processes share the layer out, all that is computed with must be shared out, or all of it be
    # whole.
    adapters = [tensor for adapter in chain for _, tensor in adapter.parameters()]
    now = [alike(tensor, adapters) for tensor in stored(layer)]
    dtype = wide(now[0].dtype)
    bias = now[1].to(dtype) if len(now) > 1 else None
    affine = Affine((now[0].mT if layer.base.transposed else now[0]).to(dtype), bias)
    for adapter in chain:
        affine = adapter.method.apply(adapter, affine)
    weight = affine.weight.mT if layer.base.transposed else affine.weight
    folded = [weight] if bias is None or affine.bias is None else [weight, affine.bias]
    folded = [value.to(rounded or parameter.dtype) for parameter, value in zip(now, folded, strict=True)]
    if not all(bool(value.isfinite().all()) for value in folded):
        if any(
            bool((before.isfinite() & ~value.isfinite()).any())
            for before, value in zip(now, folded, strict=True)
        ):
            raise _overflow(layer, chain, rounded)
        _tell_not_finite(layer)
    return folded


def _tell_not_finite(layer: AdaptedLayer) -> None:
    warnings.warn(
        f"{layer.spec.name}: some weights were infinite or NaN before the merge and are so still",
        PeftrsWarning,
        4,
    )


def low_rank(layer: AdaptedLayer, chain: Chain) -> Update | None:
    """The whole chain's change of the stored weight, if it is of low rank, leaves the bias alone, and can be
    added in place.
    """
    weight, _ = layer.base.parameters(layer.base_layer)
    held = [weight, *(tensor for adapter in chain for _, tensor in adapter.parameters())]
    if rounding.coarse(layer) or not weight.dtype.is_floating_point or any(map(is_distributed, held)):
        return None
    if not weight.is_contiguous():
        return None
    terms: list[tuple[Tensor, Tensor, float]] = []
    for adapter in chain:
        method = adapter.method
        if (
            not isinstance(method, Additive)
            or type(method).apply is not Additive.apply
            or method.shift(adapter) is not None
        ):
            return None
        factors = method.factors(adapter)
        if factors is None:
            return None
        terms.append((*factors, float(adapter.scaling)))
    if len(terms) == 1:
        update = Update(*terms[0])
    else:
        dtype = torch.float64 if weight.dtype is not torch.bfloat16 else torch.float32
        ups, downs = zip(
            *((up.to(dtype) * scaling, down.to(dtype)) for up, down, scaling in terms), strict=True
        )
        update = Update(torch.cat(ups, -1), torch.cat(downs, -2), 1.0)
    return update.transposed() if layer.base.transposed else update
