"""What code written for PEFT asks of an adapted layer: settings by adapter name, strengths, names, the change
of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from peftrs.bases.kinds import Affine, LayerKind
from peftrs.bases.sharded import alike
from peftrs.core.fold import ordered
from peftrs.core.frozen import BENEATH, Frozen
from peftrs.core.slots import FittedAdapter
from peftrs.errors import AdapterError


class TunerLayer:
    """PEFT's interface of a layer, over what an adapted layer is."""

    frozen: Frozen
    adapters: dict[str, FittedAdapter]
    active_adapters: list[str]
    training: bool
    folded: Callable[[], Affine]

    @property
    def scaling(self) -> Any:
        """The strength of each adapter that has one, by adapter name, to be read and set."""
        return self.__getattr__("scaling")

    @scaling.setter
    def scaling(self, values: Mapping[str, float]) -> None:
        Setting(self, "scaling").update(values)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            adapters = self.__dict__.get("adapters", {})
            if any(name in adapter.method.attributes for adapter in adapters.values()):
                return Setting(self, name)
            if name in ("weight", "bias") and self.__dict__.get("read_by_owner"):
                return getattr(self.folded(), name)
            base_layer = self.__dict__.get("_modules", {}).get(BENEATH)
            if base_layer is None or name in ("adapters", "frozen"):
                raise
            if name in ("in_features", "out_features") and not hasattr(base_layer, name):
                return getattr(self.frozen.spec, name)
            return getattr(base_layer, name)

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the weights."""
        return self.frozen.ledger is not None

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters merged into the weights, in the order in which they are active."""
        return [] if self.frozen.ledger is None else list(self.frozen.ledger.names)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter alone adds to the weight, in the layout and dtype in which the layer stores it."""
        fitted = self.adapters[adapter]
        tensors = [tensor for _, tensor in fitted.parameters()]
        weight, bias = self.frozen.dense()
        base = Affine(alike(weight, tensors), None if bias is None else alike(bias, tensors))
        change = fitted.method.apply(fitted, base).weight - base.weight
        return (change.mT if self.frozen.base.transposed else change).to(base.weight.dtype)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets an adapter's strength, as a multiple of the one that its config gives."""
        if adapter in self.adapters:
            fitted = self.adapters[adapter]
            fitted.rescale(scale * fitted.own_scaling)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for adapter in ordered(self.adapters, self.active_adapters):
            adapter.rescale(adapter.scaling * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters, or without `scale` sets it back to what their configs
        give.
        """
        for adapter in ordered(self.adapters, self.active_adapters):
            adapter.rescale(adapter.own_scaling if scale is None else adapter.scaling / scale)

    def get_base_layer(self) -> nn.Module:
        """The frozen layer, below all layers adapted around it."""
        return self.frozen.innermost

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The attributes that hold adapters' tensors."""
        places = (place for adapter in self.adapters.values() for place in adapter.places.values())
        return tuple(dict.fromkeys(container for container, _ in places))

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """From the names of an adapter's tensors in a file to their names here, both within this layer."""
        fitted = self.adapters.get(adapter_name)
        return {} if fitted is None else {slot: fitted.full_name(slot) for slot, _ in fitted.parameters()}

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The attributes that hold adapters' settings."""
        return tuple(
            dict.fromkeys(name for adapter in self.adapters.values() for name in adapter.method.attributes)
        )

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the frozen layer is a linear one that stores its weight as (in, out)."""
        return self.frozen.spec.kind is LayerKind.LINEAR and self.frozen.base.transposed

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={adapter.method.name}" for name, adapter in self.adapters.items())


class Setting(MutableMapping[str, Any]):
    """One setting of every adapter of a layer, by adapter name: `layer.r["default"]`,
    `layer.scaling["default"] = 2.0`.
    """

    def __init__(self, layer: TunerLayer, name: str) -> None:
        self.layer = layer
        self.adapters = layer.adapters
        self.name = name

    def __getitem__(self, adapter: str) -> Any:
        fitted = self.adapters[adapter]
        if self.name == "scaling":
            return fitted.scaling
        if self.name not in fitted.method.attributes:
            raise KeyError(adapter)
        if self.name == f"{fitted.method.prefix}dropout":
            # Called, not read, by code that runs an adapter's tensors itself.
            return nn.Dropout(getattr(fitted.config, self.name)).train(self.layer.training)
        return fitted.values[self.name] if self.name in fitted.values else getattr(fitted.config, self.name)

    def __setitem__(self, adapter: str, value: Any) -> None:
        if self.name != "scaling":
            raise AdapterError(f"{self.name} of an adapter that exists cannot change: only its scaling can")
        self.adapters[adapter].rescale(value)

    def __delitem__(self, adapter: str) -> None:
        raise AdapterError(f"delete the adapter {adapter!r}, not its {self.name}")

    def copy(self) -> dict[str, Any]:
        """The values as they are now."""
        return dict(self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __iter__(self) -> Iterator[str]:
        return (name for name, fitted in self.adapters.items() if self.name in fitted.method.attributes)

    def __len__(self) -> int:
        return len(list(iter(self)))
