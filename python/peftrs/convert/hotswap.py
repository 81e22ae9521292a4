"""Hot-swapping: another adapter's tensors, ranks and strengths under the name of one that a model has.

The other one is loaded beside it with every check of loading, and then moved in. Where a model is compiled,
or prepared for that, tensors keep their identity and shape: lower ranks are filled up with zeros, and layers
that the other adapter leaves alone are made to change nothing.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from peftrs.config import PeftConfig, PeftType, TargetedConfig
from peftrs.convert.padding import folded, padded, targeted
from peftrs.core.inject import activation
from peftrs.core.layer import AdaptedLayer
from peftrs.core.method import method_for
from peftrs.core.replace import ReplacedModule
from peftrs.core.slots import FittedAdapter
from peftrs.core.tree import adapted_layers, uncompiled, users_model, wrappers
from peftrs.errors import AdapterError, PeftrsWarning, joined, listed
from peftrs.hub import for_hub
from peftrs.io.checkpoint import MemorySource, Source
from peftrs.io.entries import entries, plain
from peftrs.io.experts import fused
from peftrs.io.load import load, opened
from peftrs.planning.attach import attach, peft_configs, whole_or_not
from peftrs.planning.settle import changed

INCOMING = "peftrs_incoming"
"""What the other adapter is called while it stands beside the one whose name it gets."""
SAME = ("use_dora", "lora_bias", "target_parameters")
"""Fields by which configs of adapters differ that cannot stand for each other in place."""


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raises `AdapterError` unless both are LoRA adapters of one form; ranks, strengths and targets may
    differ.
    """
    kinds = [str(cast(str, config.peft_type)) for config in (config0, config1)]
    if kinds[0] != kinds[1]:
        raise AdapterError(f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}")
    if kinds[0] != PeftType.LORA:
        raise AdapterError(f"Hotswapping only supports LORA but {kinds[0]} was passed.")
    for name in SAME:
        values = getattr(config0, name), getattr(config1, name)
        if values[0] != values[1]:
            raise AdapterError(f"Configs are incompatible: for {name}, {values[0]} != {values[1]}")


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Puts the adapter in a local folder or repository in the place of `adapter_name`, which keeps its name
    and its being active.

    Tensors go to the devices of their layers, whatever `torch_device` says. Raises `AdapterError` for an
    unknown or a merged adapter, for another kind of adapter, and where a compiled model would have to change;
    `CheckpointError` for a file that does not fit. The model is then as it was.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **for_hub(kwargs))
    check_hotswap_configs_compatible(_current(model, adapter_name), config)
    source = opened(
        users_model(uncompiled(model)), model_name_or_path, kwargs.pop("key_mapping", None), **kwargs
    )
    _swap(model, adapter_name, config, source, None)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """The same from tensors by their names in the model, `adapter_name` included; `config` gives ranks and
    strengths.

    The layers are those that the names say.
    """
    current = cast(TargetedConfig, _current(model, adapter_name))
    known = {entry.name: entry.key for entry in entries(uncompiled(model), adapter_name, current)}
    container = re.compile(
        rf"(\.{re.escape(parameter_prefix)}\w+|\.modules_to_save)\.{re.escape(adapter_name)}(?=\.|$)"
    )
    # The names of another model lack the wrappers that other adapters put into this one.
    here = all(plain(name) in known for name in state_dict)
    tensors = {
        known[plain(name)] if here else container.sub(r"\1", name): tensor
        for name, tensor in state_dict.items()
    }
    names = None if config.target_parameters else tensors
    _swap(model, adapter_name, config, MemorySource(tensors, "the state dict"), names)


def _current(model: nn.Module, adapter: str) -> PeftConfig:
    base = users_model(uncompiled(model))
    configs = peft_configs(base)
    if adapter not in configs:
        raise AdapterError(f"Adapter {adapter} not found. The model has {list(configs)}.")
    merged = [layer.spec.name for layer in adapted_layers(base) if adapter in layer.merged_adapters]
    if merged:
        raise AdapterError(
            f"Cannot hot-swap adapter {adapter!r} while it is merged into {len(merged)} layers; unmerge it"
            " first"
        )
    return configs[adapter]


def _compiled(model: nn.Module) -> bool:
    return uncompiled(model) is not model or any(
        getattr(one, "_compiled_call_impl", None) is not None for one in model.modules()
    )


def _swap(
    model: nn.Module, adapter: str, config: PeftConfig, source: Source, names: Mapping[str, Any] | None
) -> None:
    root, base = uncompiled(model), users_model(uncompiled(model))
    configs, state = peft_configs(base), activation(base)
    fixed = _compiled(model) or any(isinstance(one.scaling, Tensor) for one in _fitted(base, adapter))
    active, trained = state.active, _trains(base, adapter)
    incoming = changed(cast(TargetedConfig, config), {"inference_mode": configs[adapter].inference_mode})
    with whole_or_not(base):
        attach(base, incoming, INCOMING, low_cpu_mem_usage=True, names=names, strict=False)
        load(root, INCOMING, incoming, fused(root, INCOMING, incoming, source), strict=True)
        if fixed and (faults := _faults(base, adapter)):
            raise AdapterError(
                f"{source.origin}: cannot take the place of {adapter!r} in a compiled model:"
                f" {joined(faults, 4)}; hint: load the adapter with the most layers first, and"
                " prepare_model_for_compiled_hotswap(model, target_rank=...)"
            )
    del configs[INCOMING]
    with torch.no_grad():
        for _, wrapper in list(wrappers(base)):
            if isinstance(wrapper, AdaptedLayer):
                _move(wrapper, adapter, incoming, fixed)
            elif isinstance(wrapper, ReplacedModule):
                _move_whole(wrapper, adapter, fixed)
    held = {one.spec.name: one for one in _fitted(base, adapter)}
    for one in held.values():
        one.siblings = {name: held[name] for name in one.siblings}
    state.switch(active=active)
    for _, wrapper in wrappers(base):
        wrapper.require_grad([adapter], requires_grad=trained)
    if fixed:
        incoming = changed(incoming, folded(base, adapter, incoming) | targeted(base, adapter, incoming))
    configs[adapter] = incoming
    for one in _fitted(base, adapter):
        one.config = configs[adapter]


def _fitted(base: nn.Module, adapter: str) -> list[FittedAdapter]:
    return [layer.adapters[adapter] for layer in adapted_layers(base) if adapter in layer.adapters]


def _trains(base: nn.Module, adapter: str) -> bool:
    return any(tensor.requires_grad for _, wrapper in wrappers(base) for tensor in wrapper.tensors(adapter))


def _faults(base: nn.Module, adapter: str) -> list[str]:
    """Why the incoming adapter cannot be moved into the tensors that are there."""
    faults = []
    for _, wrapper in wrappers(base):
        if INCOMING in wrapper.adapter_names() and adapter not in wrapper.adapter_names():
            name = (
                wrapper.spec.name
                if isinstance(wrapper, AdaptedLayer)
                else getattr(wrapper, "name", "a module")
            )
            faults.append(f"{name} has no such adapter")
        elif isinstance(wrapper, AdaptedLayer) and INCOMING in wrapper.adapters:
            old, new = wrapper.adapters[adapter], wrapper.adapters[INCOMING]
            if old.places.keys() != new.places.keys():
                faults.append(
                    f"{wrapper.spec.name} has {listed(list(old.places))}, it has {listed(list(new.places))}"
                )
            faults += [
                f"{wrapper.spec.name}: {slot} has shape {list(old[slot].shape)}, it has"
                f" {list(new[slot].shape)}"
                for slot in new.places
                if slot in old.places and padded(new, slot, old[slot].shape) is None
            ]
    return faults


def _move(layer: AdaptedLayer, name: str, config: TargetedConfig, fixed: bool) -> None:
    old, new = layer.adapters.get(name), layer.adapters.get(INCOMING)
    if new is None:
        if old is not None and fixed:
            _silence(layer, old)
        elif old is not None:
            layer.delete_adapter(name)
        return
    if old is not None and not old.shares and old.places.keys() == new.places.keys():
        shaped = {slot: padded(new, slot, old[slot].shape) if fixed else new[slot] for slot in old.places}
        if all(value is not None and value.shape == old[slot].shape for slot, value in shaped.items()):
            for slot, value in shaped.items():
                old[slot].copy_(cast(Tensor, value))
            old.settle(new.values)
            old.rescale(new.own_scaling)
            layer.delete_adapter(INCOMING)
            return
    if old is not None:
        old.remove()
        del layer.adapters[name]
    layer.rename_adapter(INCOMING, name)


def _silence(layer: AdaptedLayer, fitted: FittedAdapter) -> None:
    """Makes an adapter change nothing: its method's first values are such."""
    config, values = fitted.config, fitted.values
    fitted.config, fitted.values = changed(config, {"init_lora_weights": True}), values | {"start": None}
    if not fitted.shares:
        fitted.method.init(fitted, layer.base.dense(layer.base_layer))
    fitted.config, fitted.values = config, values


def _move_whole(wrapper: ReplacedModule, name: str, fixed: bool) -> None:
    held = wrapper.modules_to_save
    if INCOMING in held and name in held:
        held[name].load_state_dict(held[INCOMING].state_dict())
        wrapper.delete_adapter(INCOMING)
    elif INCOMING in held:
        held[name] = held.pop(INCOMING)
    elif name in held and fixed:
        held[name].load_state_dict(wrapper.original_module.state_dict())
    else:
        wrapper.delete_adapter(name)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Makes a model ready to be compiled once and hot-swapped often: strengths become tensors, ranks
    `target_rank`.

    To be called after the first adapter is loaded and before the model is compiled. The adapters change
    nothing else by it; their configs then state the new ranks, with strengths as they were. `config` are
    further configs to state the rank in. Raises `AdapterError` for a model that is compiled (a warning or
    nothing, as `check_compiled` says), has no LoRA adapter, or has one of a higher rank.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(
            f"check_compiled should be one of 'error', 'warn', or 'ignore', got {check_compiled!r} instead."
        )
    if _compiled(model) and check_compiled != "ignore":
        text = "call prepare_model_for_compiled_hotswap *before* compiling the model"
        if check_compiled == "error":
            raise AdapterError(text)
        warnings.warn(f"{text}: it will be compiled anew", PeftrsWarning, stacklevel=2)
    base = users_model(uncompiled(model))
    found = [
        one
        for layer in adapted_layers(base)
        for one in layer.adapters.values()
        if one.method.prefix == _prefix()
    ]
    if not found:
        raise AdapterError(
            "No adapter layers found on the model: call this after the first adapter is loaded"
        )
    if target_rank is not None:
        faults = [
            f"{one.spec.name} has rank {one.values['r']}" for one in found if one.values["r"] > target_rank
        ]
        faults += [
            f"{one.spec.name} has {one.spec.groups} groups" for one in found if target_rank % one.spec.groups
        ]
        if faults:
            raise AdapterError(f"target_rank={target_rank} does not do: {'; '.join(faults[:8])}")
    with torch.no_grad():
        for one in found:
            if target_rank is not None and not one.shares:
                _widen(one, target_rank)
            device = one.frozen.base.dense(one.frozen.module).weight.device
            one.scaling = torch.tensor(float(one.scaling), dtype=torch.float32, device=device)
            one.frozen.changed()
    for name, own in peft_configs(base).items():
        if own.peft_type == PeftType.LORA:
            for field, value in folded(base, name, own).items():
                setattr(own, field, value)
    given = config.values() if isinstance(config, Mapping) else [config] if config is not None else []
    for other in given:
        if target_rank is not None and all(other is not own for own in peft_configs(base).values()):
            settings = cast(Any, other)
            settings.r, settings.rank_pattern = (
                target_rank,
                dict.fromkeys(settings.rank_pattern or {}, target_rank),
            )


def _prefix() -> str:
    return method_for(PeftType.LORA).prefix


def _widen(fitted: FittedAdapter, rank: int) -> None:
    values = fitted.values | {"r": rank}
    for slot, kind in fitted.method.kinds(fitted.config, fitted.spec, values).items():
        held = fitted[slot]
        value = padded(fitted, slot, torch.Size(kind.shape))
        if value is not None and value.shape != held.shape:
            fitted[slot] = nn.Parameter(value, requires_grad=held.requires_grad)
    fitted.settle(values)


__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]
