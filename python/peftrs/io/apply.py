"""One layer of an adapter, changed without its model: what `peftrs-merge` asks of methods that its core has
no kernel for.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypedDict

import torch
from torch import Tensor

from peftrs import _native, registry
from peftrs.bases.base import as_dtype
from peftrs.bases.kinds import Affine, LayerKind, LayerSpec
from peftrs.config import CONFIG_NAME, PeftConfig, TargetedConfig
from peftrs.core.dtype import adapter_dtype
from peftrs.core.method import Additive, Method, method_for
from peftrs.core.target import PROJECTION
from peftrs.dtype import DTYPES
from peftrs.errors import ConfigError, MergeError


class Layer(TypedDict):
    """A layer as a checkpoint shows it: the weight's dtype and shape as stored, and the adapter's tensors for
    it.

    `strength` multiplies the adapter's change; `transposed` says what the configs know of square weights.
    """

    config: str
    strength: float
    path: str
    parameter: str
    dtype: str
    shape: list[int]
    bias: bool
    transposed: bool
    slots: list[tuple[str, str, list[int]]]


@dataclass
class Alone:
    """An adapter on one layer, as its method sees it."""

    config: Any
    spec: LayerSpec
    values: dict[str, Any]
    scaling: float
    tensors: dict[str, Tensor]

    def __getitem__(self, slot: str) -> Tensor:
        return self.tensors[slot]

    def get(self, slot: str) -> Tensor | None:
        return self.tensors.get(slot)

    def __contains__(self, slot: object) -> bool:
        return slot in self.tensors


def prefix(config: str) -> str:
    """How the names of the adapter's tensors begin.

    Raises `ConfigError` for a config that peftrs cannot follow.
    """
    return method_for(_config(config).peft_type or "").prefix


def check(layer: Layer) -> tuple[bool, bool]:
    """Whether the method only adds to the layer, and whether it changes its bias.

    Raises `MergeError` for what does not fit.
    """
    method, adapter, _ = _fit(layer)
    if fault := method.unmergeable(adapter):
        raise MergeError(f"{layer['path']}: {fault}")
    if layer["strength"] != 1 and not isinstance(method, Additive):
        return False, layer["bias"]
    # A fake layer shows what becomes of the bias, for nothing.
    with torch.device("meta"):
        affine = Affine(
            torch.empty(adapter.spec.shape), torch.empty(adapter.spec.out_features) if layer["bias"] else None
        )
        adapter.tensors |= {slot: torch.empty(shape) for slot, _, shape in layer["slots"]}
        changed = method.apply(adapter, affine)
    return isinstance(method, Additive), layer["bias"] and changed.bias is not affine.bias


@torch.no_grad()
def apply(
    layer: Layer, slots: Sequence[bytes], wide: str, weight: bytes, bias: bytes | None
) -> tuple[bytes, bytes | None]:
    """The layer's weight and bias with the adapter's change, from those without it: values of the dtype
    `wide`, as stored.
    """
    method, adapter, transposed = _fit(layer)
    stored = _tensor(weight, wide, layer["shape"])
    affine = Affine(stored.mT if transposed else stored, None if bias is None else _tensor(bias, wide, [-1]))
    base = as_dtype(affine, DTYPES[layer["dtype"]])
    kept = adapter_dtype(base.weight, True)
    named = zip(layer["slots"], slots, strict=True)
    adapter.tensors = {slot: _tensor(data, dtype, shape).to(kept) for (slot, dtype, shape), data in named}
    rebuilt = method.rebuilt(adapter, base)
    adapter.tensors |= {slot: value.to(kept).contiguous() for slot, value in rebuilt.items()}
    adapter.scaling *= layer["strength"]
    changed = method.apply(adapter, affine)
    return _bytes(changed.weight.mT if transposed else changed.weight, wide), (
        None if changed.bias is None else _bytes(changed.bias, wide)
    )


@lru_cache(maxsize=8)
def _config(text: str) -> TargetedConfig:
    values = json.loads(text)
    config = PeftConfig.from_values(values, CONFIG_NAME)
    config.check_file(values, CONFIG_NAME)
    if not isinstance(config, TargetedConfig):
        raise ConfigError(f"adapters of type {config.peft_type} change no weights")
    return config


def _fit(layer: Layer) -> tuple[Method, Alone, bool]:
    """The method, the adapter without its tensors, and whether the weight is stored as (in, out).

    The kind of the layer is the one whose tensors would have the names and shapes that the adapter's have.
    """
    config = _config(layer["config"])
    method = registry.method(config.peft_type or "").variant(config)
    found = {slot: tuple(shape) for slot, _, shape in layer["slots"]}
    fitting, faults = [], []
    for kind, transposed in _kinds(layer):
        shape = list(layer["shape"])
        if transposed:
            shape[-2:] = shape[:-3:-1]
        if kind not in method.layers:
            continue
        projection = layer["path"].endswith(".base_layer.out_proj")
        strength = PROJECTION if projection else 1.0
        target = layer["path"].removesuffix(".base_layer.out_proj").replace("base_layer.", "")
        name = f"{target}.{layer['parameter']}" if kind is LayerKind.PARAMETER else target
        spec = LayerSpec(name, kind, tuple(shape), layer["bias"], 1, strength, _matched(config, name))
        try:
            values = method.settle(config, spec)
        except ConfigError as error:
            faults.append(str(error))
            continue
        kinds = method.kinds(config, spec, values)
        expected = {slot: kind.shape for slot, kind in kinds.items() if kind.saved}
        if expected == found:
            scaling = method.scale(config, values) * strength
            fitting.append((transposed, Alone(config, spec, values, scaling, {})))
        else:
            faults.append(f"a layer of kind {kind} would have tensors {expected}")
    if not fitting:
        raise MergeError(
            f"{layer['path']} has tensors {found} for a weight {layer['shape']}:"
            f" {'; '.join(faults) or 'no layer of it'}"
        )
    stated = layer["transposed"]
    transposed, adapter = next((one for one in fitting if one[0] == stated), fitting[0])
    return method, adapter, transposed


def _kinds(layer: Layer) -> Iterator[tuple[LayerKind, bool]]:
    """The kinds that the weight may be of, each with whether it is then stored as (in, out)."""
    if layer["parameter"] == "in_proj_weight":
        yield LayerKind.ATTENTION, False
    elif layer["parameter"] != "weight":
        yield LayerKind.PARAMETER, False
        yield LayerKind.PARAMETER, True
    elif len(layer["shape"]) == 2:
        yield LayerKind.LINEAR, False
        yield LayerKind.LINEAR, True
        yield LayerKind.EMBEDDING, True
    elif len(layer["shape"]) in (3, 4, 5):
        yield {3: LayerKind.CONV1D, 4: LayerKind.CONV2D, 5: LayerKind.CONV3D}[len(layer["shape"])], False


def _matched(config: TargetedConfig, name: str) -> dict[str, Any]:
    """The value that each of the config's pattern fields gives the layer."""
    patterns = {field: list(getattr(config, field) or {}) for field in config.pattern_fields}
    selection = _native.select([name], target_modules=[name], patterns=patterns)
    keys = {field: selection.pattern_index(field)[0] for field in config.pattern_fields}
    return {field: list(getattr(config, field).values())[key] for field, key in keys.items() if key >= 0}


def _tensor(data: bytes, dtype: str, shape: Sequence[int]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(list(shape))


def _bytes(tensor: Tensor, dtype: str) -> bytes:
    plain = tensor.to(DTYPES[dtype]).contiguous()
    # Not by way of numpy, which torch works without.
    return ctypes.string_at(plain.data_ptr(), plain.nbytes)
