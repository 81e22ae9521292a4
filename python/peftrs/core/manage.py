"""Which adapters act, on a whole model: switching, turning off, deleting, merging, taking off."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import nn

from peftrs.bases.quantized import Quantized
from peftrs.bases.resolve import resolve
from peftrs.bases.sharded import reshard
from peftrs.core import merge as merging
from peftrs.core.activation import Activation, Switched
from peftrs.core.batch import NONE, Rows
from peftrs.core.inject import activation
from peftrs.core.layer import AdaptedLayer
from peftrs.core.prompt import Prompts, prompts_of
from peftrs.core.prompt_call import uproot
from peftrs.core.tree import Wrapped, adapted_layers, places
from peftrs.errors import AdapterError, MergeError, PeftrsWarning, listed

Layer = TypeVar("Layer")

EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")
"""In the names of modules that are one of several experts, each given the tokens that are sent to it."""


def check_known(model: nn.Module, names: Sequence[str]) -> None:
    """Raises `AdapterError` naming the adapters that the model does not have."""
    _check_known(activation(model), names)


def _check_known(state: Activation, names: Sequence[str]) -> None:
    for name in names:
        if not any(
            (member := held()) is not None and name in member.adapter_names() for held in state.joined
        ):
            raise AdapterError(f"Adapter {name} not found. The model has {state.adapters()}.")


def set_adapter(model: nn.Module, names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Makes these the active adapters, in this order, and the only ones trained (none with `inference_mode`).

    Merged adapters are unmerged, with a warning. Raises `AdapterError` for an unknown name, or for two that
    cannot act together.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    state = activation(model)
    _check_known(state, chosen)
    if len(chosen) > 1 and (
        faults := [fault for member in state.members if (fault := member.conflict(chosen))]
    ):
        raise AdapterError("; ".join(faults[:4]))
    held = state.members if state.merged else ()
    merged = [member for member in held if isinstance(member, AdaptedLayer) and member.merged]
    state.merged = bool(merged)
    if any(layer.merged_adapters != [name for name in chosen if name in layer.adapters] for layer in merged):
        warnings.warn(f"{merged[0].merged_adapters} were merged and are unmerged now", PeftrsWarning, 3)
        unmerge(merged)
    state.switch(active=tuple(chosen))
    state.clear()
    state.require_grad(chosen, only=True, requires_grad=not inference_mode)


def set_requires_grad(model: nn.Module, names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Sets whether the named adapters are trained, leaving the others as they are."""
    chosen = [names] if isinstance(names, str) else list(names)
    check_known(model, chosen)
    activation(model).require_grad(chosen, requires_grad=requires_grad)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Turns all adapters off, or the active ones on; gradients follow, as in PEFT."""
    state = activation(model)
    state.switch(enabled=enabled)
    state.clear()
    state.require_grad(state.active if enabled else (), only=True)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapters inside the `with`.

    What is trained stays as it is, so that this costs one write.
    """
    state = activation(model)
    before, own = state.acting, [(module, module.override) for module in state.overridden]
    state.clear()
    state.switch(enabled=False)
    try:
        yield
    finally:
        state.acting = before
        for module, override in own:
            module.override = override
            state.overridden.append(module)


@contextmanager
def mixed(model: nn.Module, names: Sequence[str], count: int | None = None) -> Iterator[None]:
    """The model with an adapter of its own for every row of a batch inside the `with`; "__base__" is none.

    Which adapters are active does not matter then. `count` is the number of rows given to the model. Raises
    `AdapterError` for an unknown name, another number of rows, a model in training, or what has no rows:
    merged weights, bare parameters, prompts.
    """
    if isinstance(names, str) or not names:
        raise AdapterError(
            f"`adapter_names` is {names!r}; it has to be a list with a name for every row of the batch"
        )
    if count is not None and count != len(names):
        found = f"got {len(names)} and {count} respectively"
        raise AdapterError(
            f"Length of `adapter_names` should be the same as the number of inputs, but {found}."
        )
    if model.training:
        raise AdapterError("Cannot pass `adapter_names` when the model is in training mode.")
    state = activation(model)
    used = [name for name in dict.fromkeys(names) if name != NONE]
    known = state.adapters()
    if unknown := [name for name in used if name not in known]:
        raise AdapterError(
            f"Trying to infer with non-existing adapter(s): {listed(unknown)}. The model has {known}."
        )
    held = [member for member in state.members if any(name in member.adapter_names() for name in used)]
    if faults := [fault for member in held if (fault := _united(member))]:
        raise AdapterError("; ".join(faults[:4]))
    states = [state, *(module.override for module in state.overridden if module.override is not None)]
    before = [one.acting for one in states]
    for one in states:
        one.switch(gate=Rows(names))
    try:
        yield
    finally:
        for one, acting in zip(states, before, strict=True):
            one.acting = acting


def _united(member: Switched) -> str | None:
    """Why the rows of a batch cannot have adapters of their own here, or None if they can."""
    if isinstance(member, Prompts):
        return "a prompt is for the whole batch, and `adapter_names` names one"
    if isinstance(member, AdaptedLayer):
        if member.merged:
            return (
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter`"
                " first."
            )
        if member.base.opaque or member.read_by_owner:
            return (
                f"{member.spec.name}: its weight is read by another module, so that rows cannot have adapters"
                " of their own"
            )
        if EXPERT.search(member.spec.name):
            return (
                f"{member.spec.name}: an expert is given some tokens of a batch, so that rows cannot have"
                " adapters of their own"
            )
    return None


def delete_adapter(model: nn.Module, name: str) -> None:
    """Takes an adapter off every layer.

    The next one becomes active, with a warning, where it was the only active one.
    """
    check_known(model, [name])
    state = activation(model)
    members, was_active = state.members, name in state.active
    merged = [
        one.spec.name for one in members if isinstance(one, AdaptedLayer) and name in one.merged_adapters
    ]
    if merged:
        raise AdapterError(
            f"Cannot delete adapter {name!r} while it is merged into {len(merged)} layers; unmerge it first"
        )
    for member in members:
        member.delete_adapter(name)
    state.switch(active=tuple(other for other in state.active if other != name))
    left = state.adapters()
    if was_active and not state.active and left:
        state.switch(active=(left[0],))
        following = [member for member in members if member.override is None]
        if following:
            warnings.warn(
                f"adapter {name!r} was active and is deleted; {left[0]!r} is active now", PeftrsWarning, 3
            )
        for member in following:
            member.require_grad(state.active, only=True)


def merge(
    model: nn.Module,
    names: Sequence[str] | None = None,
    track: merging.Track = iter,
    *,
    keep: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Merges adapters (the active ones unless named) into all layers, or into none. `track` sees the layers
    go by.

    Quantized layers are quantized again, which tells what that loses and is refused where most would be, or
    with `dtype`, for good, become dense ones.

    All is checked first, and a failure on the way takes back what was merged; without `keep`, which is for
    good, only what no check can foresee fails (an interrupt, the end of memory), and merging again then
    finishes the work. Weights that other modules share are copied for the merge, with a warning that says how
    many bytes; unmerging ties them again. Raises `AdapterError` for an unknown name, `MergeError` for what
    cannot be merged.
    """
    prompts = prompts_of(model)
    if prompts is not None:
        named = prompts.active_adapters if names is None else names
        if found := [name for name in named if name in prompts]:
            raise MergeError(
                f"{found[0]!r} is a prompt: it changes no weights to be merged into; hint: `unload()` takes"
                " it off"
            )
    reshard(model)
    check_known(model, names or ())
    layers = list(adapted_layers(model))
    merges: list[merging.Merge] = []
    for layer in layers:
        wanted = layer.to_merge(names)
        # What was merged before goes into the layer as it is, not as it was rounded to a coarser dtype.
        if wanted or merging.is_rounded_twice(layer.frozen, dtype):
            merges.append(layer.merging(wanted))
    merged = list(dict.fromkeys(name for layer in layers for name in layer.merged_adapters))
    if merged:
        more = [
            name for name in dict.fromkeys(name for one in merges for name in one.names) if name not in merged
        ]
        rest = f"merging {more} too" if more else "all adapters are already merged, nothing to do"
        warnings.warn(f"{merged} are merged already; {rest}", PeftrsWarning, 3)
    if faults := [
        fault for layer in layers if (fault := layer.conflict(layer.merging(layer.to_merge(names)).names))
    ]:
        raise MergeError("; ".join(faults[:4]))
    activation(model).merged = True
    merging.merge(merges, keep=keep, dtype=dtype, track=track, model=model)


def unmerge(layers: Sequence[AdaptedLayer]) -> None:
    """Restores the bits of these layers from before they were merged."""
    for layer in layers:
        if layer.merged:
            layer.unmerge()


def unload(
    model: nn.Module,
    *,
    merged: bool,
    names: Sequence[str] | None = None,
    track: merging.Track = iter,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Takes all wrappers off the model, adapters merged into the weights or left out; trained whole modules
    stay in place.

    With `dtype`, all quantized layers of the model become dense ones, adapted or not. Of the others, those
    that adapters are merged into get it where it is wider than their own.
    """
    if merged:
        merge(model, names, track, keep=False, dtype=dtype)
    else:
        unmerge(list(adapted_layers(model)))
    state = activation(model)
    for place in list(places(model))[::-1]:
        module = place.module
        while isinstance(module, Wrapped):
            if isinstance(module, AdaptedLayer):
                module = module.base_layer
            else:
                chosen = [name for name in names or state.active if name in module.modules_to_save]
                module = module.modules_to_save[chosen[0]] if chosen else module.original_module
        base = None if dtype is None else resolve(module)
        if isinstance(base, Quantized) and dtype is not None:
            plain = base.plain(base.dense(module), dtype).train(module.training)
            base.dropped(module)
            module = plain
        if module is not place.module:
            place.put(module)
    uproot(model)
    return model


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are, adapters included."""
    trained = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            # Two 4-bit weights stand in one byte.
            count *= 2 * (parameter.quant_storage.itemsize if hasattr(parameter, "quant_storage") else 1)
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def progress(layers: list[Layer], doing: str) -> Iterable[Layer]:
    """The layers, with a bar that shows how many went by where tqdm is installed."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return layers
    return cast(Iterable[Layer], tqdm(layers, desc=doing, unit="layer"))
