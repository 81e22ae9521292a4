"""Which adapters act, on a whole model: switching, turning off, deleting, merging, taking off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from peftrs.core import merge as merging
from peftrs.core.inject import activation, adapters
from peftrs.core.layer import Activation, AdaptedLayer
from peftrs.core.replace import ReplacedModule
from peftrs.core.tree import Wrapped, adapted_layers, places, wrappers
from peftrs.errors import AdapterError, PeftrsWarning


def check_known(model: nn.Module, names: Sequence[str]) -> None:
    """Raises `AdapterError` naming the adapters that the model does not have."""
    known = adapters(model)
    for name in names:
        if name not in known:
            raise AdapterError(f"Adapter {name} not found. The model has {known}.")


def set_adapter(model: nn.Module, names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Makes these the active adapters, in this order, and the only ones trained (none with `inference_mode`).

    Merged adapters are unmerged, with a warning. Raises `AdapterError` for an unknown name, or for two that replace one module.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    check_known(model, chosen)
    held = list(wrappers(model))
    for _, wrapper in held:
        if isinstance(wrapper, ReplacedModule) and sum(name in wrapper.modules_to_save for name in chosen) > 1:
            raise AdapterError(f"{wrapper.name}: {chosen} each replace this module; only one of them can be active")
    state = activation(model)
    merged = [wrapper for _, wrapper in held if isinstance(wrapper, AdaptedLayer) and wrapper.merged]
    if merged and tuple(chosen) != state.active:
        warnings.warn(f"{merged[0].merged_adapters} were merged and are unmerged now", PeftrsWarning, 3)
        unmerge(merged)
    state.active = tuple(chosen)
    for _, wrapper in held:
        wrapper.override = None
        wrapper.require_grad(chosen, only=True, requires_grad=not inference_mode)


def set_requires_grad(model: nn.Module, names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Sets whether the named adapters are trained, leaving the others as they are."""
    chosen = [names] if isinstance(names, str) else list(names)
    check_known(model, chosen)
    for _, wrapper in wrappers(model):
        wrapper.require_grad(chosen, requires_grad=requires_grad)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Turns all adapters off, or the active ones on; gradients follow, as in PEFT."""
    state = activation(model)
    state.enabled = enabled
    for _, wrapper in wrappers(model):
        wrapper.override = None
        wrapper.require_grad(state.active if enabled else (), only=True)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapters inside the `with`; what is trained stays as it is, so this costs one write."""
    state = activation(model)
    before = state.enabled
    overrides = [wrapper for _, wrapper in wrappers(model) if wrapper.override is not None] if _overridden(model) else []
    kept = [wrapper.override for wrapper in overrides]
    for wrapper in overrides:
        wrapper.override = None
    state.enabled = False
    try:
        yield
    finally:
        state.enabled = before
        for wrapper, override in zip(overrides, kept, strict=True):
            wrapper.override = override


def _overridden(model: nn.Module) -> bool:
    return any(isinstance(module, Wrapped) and module.override is not None for module in model.modules())


def delete_adapter(model: nn.Module, name: str) -> None:
    """Takes an adapter off every layer. The next one becomes active, with a warning, where it was the only active one."""
    check_known(model, [name])
    held = list(wrappers(model))
    merged = [wrapper.spec.name for _, wrapper in held if isinstance(wrapper, AdaptedLayer) and name in wrapper.merged_adapters]
    if merged:
        raise AdapterError(f"Cannot delete adapter {name!r} while it is merged into {len(merged)} layers; unmerge it first")
    state = activation(model)
    for _, wrapper in held:
        wrapper.delete_adapter(name)
    state.active = tuple(other for other in state.active if other != name)
    left = adapters(model)
    if not state.active and left:
        warnings.warn(f"adapter {name!r} was active and is deleted; {left[0]!r} is active now", PeftrsWarning, 3)
        set_adapter(model, left[0])


def merge(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Merges adapters into all layers, or into none: tensors are checked first, and a failure takes back what was merged."""
    layers = list(adapted_layers(model))
    chains = {id(layer): merging.names_to_merge(layer, names) for layer in layers}
    for layer in layers:
        merging.check(layer, layer.chain(chains[id(layer)]))
    unshare(model, [layer for layer in layers if chains[id(layer)]])
    done: list[AdaptedLayer] = []
    try:
        for layer in layers:
            if chains[id(layer)]:
                done.append(layer)
                merging.merge(layer, chains[id(layer)])
    except BaseException:
        unmerge([layer for layer in done if layer.merged])
        raise


def unmerge(layers: Sequence[AdaptedLayer]) -> None:
    """Restores the bits of these layers from before they were merged."""
    for layer in layers:
        if layer.merged:
            layer.unmerge()


def unload(model: nn.Module, *, merged: bool, names: Sequence[str] | None = None) -> nn.Module:
    """Takes all wrappers off the model, adapters merged into the weights or left out; trained whole modules stay in place."""
    if merged:
        merge(model, names)
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
        if module is not place.module:
            place.put(module)
    return model


def unshare(model: nn.Module, layers: Sequence[AdaptedLayer]) -> None:
    """Gives layers a weight of their own where another module holds the same one, so that merging does not change both.

    The ledger of the layer remembers the shared weight; unmerging ties it again.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name))
    copied = 0
    for layer in layers:
        weight, _ = layer.base.parameters(layer.base_layer)
        others = holders.get(id(weight), [])
        if len(others) < 2 or layer.merged:
            continue
        own = {id(module) for module in layer.modules()}
        owner, name = next((module, name) for module, name in others if id(module) in own)
        setattr(owner, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
        layer.shared = (name, weight)
        copied += weight.nbytes
    if copied:
        warnings.warn(f"weights shared between layers were copied before the merge: {copied:,} bytes more", PeftrsWarning, 4)


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


__all__ = [
    "Activation",
    "check_known",
    "delete_adapter",
    "disabled",
    "merge",
    "set_adapter",
    "set_enabled",
    "set_requires_grad",
    "torch",
    "trainable_parameters",
    "unload",
    "unmerge",
    "unshare",
]
