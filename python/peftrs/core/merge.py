"""Merging adapters into the weights of a layer, and taking them out again to the bit.

Arithmetic: from the stored bits, in float32 (float64 where the weights are float32), over all merged adapters, then rounded once.
Merging further adapters starts again from the original bits, so that `merge(a); merge(b)` equals `merge([a, b])`.

The ledger keeps the original weights (as many bytes per weight as their dtype has: 2 for bfloat16, 4 for float32) and biases, so
that unmerging restores every bit even if the factors changed, were deleted, or the model moved to another device.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftrs.bases.kinds import Affine
from peftrs.core.method import Additive
from peftrs.errors import MergeError, PeftrsWarning, listed
from peftrs.ops.low_rank import add_low_rank_

if TYPE_CHECKING:
    from peftrs.core.layer import AdaptedLayer, Chain


@dataclass(frozen=True)
class Shared:
    """A weight or bias that other modules hold too, and where the layer to be merged holds it."""

    owner: nn.Module
    attribute: str
    parameter: nn.Parameter


@dataclass(frozen=True)
class Ledger:
    """What it takes to undo a merge: the names, in the order in which they are active, and the stored tensors from before.

    `originals` goes by the position in `stored`. What was shared is kept as it was, and the layer has its own while merged.
    """

    names: tuple[str, ...]
    originals: dict[int, Tensor]
    shared: tuple[Shared, ...]

    @property
    def bytes(self) -> int:
        """How much memory the originals take."""
        return sum(tensor.nbytes for tensor in self.originals.values())


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
def merge(layer: AdaptedLayer, names: Sequence[str], shared: tuple[Shared, ...] = ()) -> None:
    """Merges the named adapters into a layer, beside those merged already. Raises `MergeError`, changing nothing."""
    if not names:
        return
    # In the order of activation, from which the chain follows: an order taken from the chain would be turned round once more.
    earlier = layer.merged_adapters
    together = tuple(dict.fromkeys([*earlier, *names]))
    chain = layer.chain(together)
    check(layer, chain)
    if layer.ledger is not None:
        shared = layer.ledger.shared
        unmerge(layer)
    kept = {id(one.parameter) for one in shared}
    originals = {at: tensor.detach().clone() for at, tensor in enumerate(stored(layer)) if id(tensor) not in kept}
    for one in shared:
        own = nn.Parameter(one.parameter.detach().clone(), requires_grad=one.parameter.requires_grad)
        setattr(one.owner, one.attribute, own)
    layer.ledger = Ledger(together, originals, shared)
    try:
        _write(layer, chain)
        if not all(bool(parameter.isfinite().all()) for parameter in stored(layer)):
            raise MergeError(
                f"{layer.spec.name}: merging {listed(list(together))} gives weights beyond "
                f"{stored(layer)[0].dtype}; lower the adapter's scaling or merge into a wider dtype"
            )
    except BaseException:
        unmerge(layer)
        merge(layer, earlier, shared)
        raise


@torch.no_grad()
def unmerge(layer: AdaptedLayer) -> None:
    """Restores a layer's original bits, in the dtype that the layer has now. Warns if nothing is merged."""
    if layer.ledger is None:
        warnings.warn(f"{layer.spec.name}: nothing is merged, nothing to do", PeftrsWarning, 4)
        return
    for one in layer.ledger.shared:
        setattr(one.owner, one.attribute, one.parameter)
    parameters = stored(layer)
    for at, original in layer.ledger.originals.items():
        parameters[at].detach().copy_(original)
    layer.ledger = None


def unmerged(layer: AdaptedLayer) -> list[Tensor]:
    """The layer's weight and, if it has one, bias, as they are without what is merged."""
    if layer.ledger is None:
        return list(stored(layer))
    originals = dict(layer.ledger.originals)
    shared = iter(layer.ledger.shared)
    return [originals[at] if at in originals else next(shared).parameter for at in range(len(stored(layer)))]


def stored(layer: AdaptedLayer) -> list[nn.Parameter]:
    """The layer's own weight and, if it has one, bias."""
    return [parameter for parameter in layer.base.parameters(layer.base_layer) if parameter is not None]


def shared_weights(model: nn.Module, layers: Sequence[AdaptedLayer]) -> dict[AdaptedLayer, tuple[Shared, ...]]:
    """The layers among these, not merged yet, whose weight or bias other modules of the model hold too.

    Raises `MergeError` for a layer that hangs in another place as well, unadapted: there its weight cannot be told apart.
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
        for parameter in stored(layer):
            places = holders.get(id(parameter), [])
            for owner, attribute in (place for place in places if place[0] in inside):
                if any(parent not in inside for parent, _ in holders.get(id(owner), [])):
                    raise MergeError(
                        f"{layer.spec.name}: the layer beneath hangs in another place of the model too, which is not adapted "
                        "and which merging would change; give that place a copy of the layer"
                    )
                if len(places) > 1:
                    shared.append(Shared(owner, attribute, parameter))
        if shared:
            found[layer] = tuple(shared)
    return found


def check(layer: AdaptedLayer, chain: Chain) -> None:
    """Raises `MergeError` for what can be known before a weight is touched: tensors that are not numbers, maps that do not fit."""
    broken = [f"{a.name}: {slot}" for a in chain for slot, tensor in a.parameters() if not bool(tensor.isfinite().all())]
    if broken:
        raise MergeError(f"{layer.spec.name}: {listed(broken)} holds NaN or infinite values; the adapter seems to be broken")
    for adapter in chain:
        fault = adapter.method.unmergeable(adapter)
        if fault:
            raise MergeError(f"{layer.spec.name}: adapter {adapter.name!r} cannot be merged: {fault}")


def _write(layer: AdaptedLayer, chain: Chain) -> None:
    weight, bias = layer.base.parameters(layer.base_layer)
    factors = low_rank(chain, wide(weight.dtype))
    if factors is not None and weight.dtype.is_floating_point and weight.is_contiguous():
        up, down = factors
        if layer.base.transposed:
            up, down = down.mT, up.mT
        held = weight.detach()
        rows = held if layer.spec.stacked else held.flatten(1)
        add_low_rank_(rows, up, down)
        return
    base = Affine(weight.mT if layer.base.transposed else weight, bias)
    affine = Affine(base.weight.to(wide(weight.dtype)), None if bias is None else bias.to(wide(weight.dtype)))
    for adapter in chain:
        affine = adapter.method.apply(adapter, affine)
    base.weight.detach().copy_(affine.weight)
    if bias is not None and affine.bias is not None:
        bias.detach().copy_(affine.bias)


def low_rank(chain: Chain, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """The factors of the whole chain's change, scaling in the first one, if all of it is of low rank and leaves the bias alone."""
    ups, downs = [], []
    for adapter in chain:
        method = adapter.method
        if not isinstance(method, Additive) or type(method).apply is not Additive.apply or method.shift(adapter) is not None:
            return None
        factors = method.factors(adapter)
        if factors is None:
            return None
        ups.append(factors[0].to(dtype) * adapter.scaling)
        downs.append(factors[1].to(dtype))
    return torch.cat(ups, -1), torch.cat(downs, -2)
