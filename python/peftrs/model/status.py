"""What state the adapters of a model are in, layer by layer and as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

from torch import nn

from peftrs.bases.kinds import LayerKind
from peftrs.core import manage
from peftrs.core.layer import AdaptedLayer
from peftrs.core.replace import ReplacedModule
from peftrs.core.tree import Holder, wrappers
from peftrs.errors import AdapterError
from peftrs.model.tuners import TUNERS

Irregular = Literal["irregular"]
Value = TypeVar("Value")


@dataclass
class TunerLayerStatus:
    """One layer that has adapters. What differs between its tensors is "irregular"."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None
    routes: dict[str, str] = field(default_factory=dict)
    """How each active adapter runs in training: "fused" with the layer beneath it, or "composite: " and
    why.
    """


@dataclass
class TunerModelStatus:
    """A model's adapters as a whole.

    What differs between its layers is "irregular": it may not work as expected.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None
    routes: dict[str, int] = field(default_factory=dict)
    """How active adapters run in training, each way with the number of layers that take it; see
    `TunerLayerStatus.routes`.
    """


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every layer that has adapters. Raises `AdapterError` for a model without any."""
    root = _inside(model)
    found = [_status(name, wrapper) for name, wrapper in wrappers(root)]
    if not found:
        raise AdapterError(
            "No adapter layers found in the model: it is neither a PeftModel nor has adapters injected"
            " into it"
        )
    return found


def _status(name: str, wrapper: Holder) -> TunerLayerStatus:
    tensors = {adapter: wrapper.tensors(adapter) for adapter in wrapper.adapter_names()}
    adapted = wrapper if isinstance(wrapper, AdaptedLayer) else None
    return TunerLayerStatus(
        name=name,
        module_type=_type_of(wrapper),
        enabled=not wrapper.disable_adapters,
        active_adapters=list(wrapper.state.active),
        merged_adapters=adapted.merged_adapters if adapted else [],
        requires_grad={
            key: _same(tensor.requires_grad for tensor in held) for key, held in tensors.items() if held
        },
        available_adapters=sorted(tensors),
        devices={
            key: sorted({tensor.device.type for tensor in held}) for key, held in tensors.items() if held
        },
        quantization_backend=None,
        routes=adapted.routes() if adapted else {},
    )


def _type_of(wrapper: Holder) -> str:
    """What kind of layer it is, in PEFT's words, where several methods change it with all of their names."""
    if isinstance(wrapper, AdaptedLayer):
        methods = {fitted.method.name.lower() for fitted in wrapper.adapters.values()}
        kind = (
            "ParamWrapper"
            if wrapper.spec.kind is LayerKind.PARAMETER
            else type(wrapper.get_base_layer()).__name__
        )
        return f"{'+'.join(sorted(methods))}.{kind}"
    return "ModulesToSaveWrapper" if isinstance(wrapper, ReplacedModule) else type(wrapper).__name__


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of a model's adapters as a whole. Raises `AdapterError` for a model without any."""
    layers = get_layer_status(model)
    root = _inside(model)
    wrapped = root is not model
    base = cast(nn.Module, root.model) if wrapped else model
    trained, total = manage.trainable_parameters(model)
    configs = getattr(base, "peft_config", {})
    available = sorted({name for layer in layers for name in layer.available_adapters})
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    partly = any(
        (set(layer.available_adapters) - set(layer.merged_adapters)) & set(merged) for layer in layers
    )
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=_name_of(root) if wrapped else "None",
        peft_types={name: str(config.peft_type) for name, config in configs.items()} if wrapped else {},
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same(layer.enabled for layer in layers),
        active_adapters=_same(layer.active_adapters for layer in layers),
        merged_adapters="irregular" if partly else merged,
        requires_grad={
            name: _same(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in available
        },
        available_adapters=available,
        devices={
            name: sorted({kind for layer in layers for kind in layer.devices.get(name, ())})
            for name in available
        },
        quantization_backend=_same(layer.quantization_backend for layer in layers),
        routes=dict(Counter(route for layer in layers for route in layer.routes.values())),
    )


def _name_of(tuner: nn.Module) -> str:
    """What PEFT calls a tuner with such adapters."""
    return next(
        (kind.__name__ for kind in TUNERS.values() if kind.__instancecheck__(tuner)), type(tuner).__name__
    )


def _inside(model: nn.Module) -> nn.Module:
    """What the names of layers are relative to: the module below a `PeftModel`, else the model."""
    inner = model._modules.get("base_model")
    return inner if hasattr(type(model), "peft_config") and inner is not None else model


def _same(values: Iterable[Value]) -> Value | Irregular:
    first, *others = values
    return first if all(value == first for value in others) else "irregular"
