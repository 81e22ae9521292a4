"""The adapted layer: a frozen layer with adapters over it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base, as_dtype
from peftrs.bases.kinds import Affine, LayerKind, LayerSpec
from peftrs.bases.offload import device_of, onloaded
from peftrs.bases.parallel import Parallel
from peftrs.bases.sharded import alike, gathered, in_parts, whole
from peftrs.core import batch
from peftrs.core import merge as merging
from peftrs.core.activation import Activation, Stores, Switched
from peftrs.core.fold import Beneath, Chain, fold
from peftrs.core.method import Side
from peftrs.core.slots import FittedAdapter, empty
from peftrs.errors import AdapterError, MergeError, PeftrsWarning


class AdaptedLayer(Switched, nn.Module):
    """A frozen layer and the adapters over it. What it does not know itself, it asks the frozen layer for.

    `ledger` holds what is needed to take merged adapters out again, and is None while nothing is merged.
    """

    base: Base
    spec: LayerSpec
    adapters: dict[str, FittedAdapter]
    ledger: merging.Ledger | None = None
    whole = False
    parallel: Parallel | None = None
    """How the layer lies over processes, where a plan of tensor parallelism spreads it."""
    read_by_owner = False
    """Whether the module above reads `weight` and `bias` instead of calling the layer: it then gets the
    changed ones.
    """

    def __init__(self, base_layer: nn.Module, base: Base, activation: Activation, spec: LayerSpec) -> None:
        empty(self)
        self._modules["base_layer"] = base_layer
        # Not one by one as attributes, each of which torch would look over for parameters and modules.
        self.__dict__ |= {"base": base, "spec": spec, "adapters": {}, "training": base_layer.training}
        self.join(activation)

    @property
    def base_layer(self) -> nn.Module:
        """The frozen layer, or one adapted beneath this one."""
        # torch looks in three places before it finds a module among modules.
        modules: dict[str, Any] = self._modules
        try:
            return modules["base_layer"]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError("base_layer") from None

    @base_layer.setter
    def base_layer(self, module: nn.Module) -> None:
        self._modules["base_layer"] = module

    @property
    def scaling(self) -> Any:
        """The strength of each adapter that has one, by adapter name, to be read and set."""
        return self.__getattr__("scaling")

    @scaling.setter
    def scaling(self, values: Mapping[str, float]) -> None:
        Setting(self.adapters, "scaling").update(values)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            adapters = self.__dict__.get("adapters", {})
            if any(name in adapter.method.attributes for adapter in adapters.values()):
                return Setting(adapters, name)
            if name in ("weight", "bias") and self.__dict__.get("read_by_owner"):
                return getattr(self.folded(), name)
            base_layer = self.__dict__.get("_modules", {}).get("base_layer")
            if base_layer is None or name in ("adapters", "ledger"):
                raise
            if name in ("in_features", "out_features") and not hasattr(base_layer, name):
                return getattr(self.spec, name)
            return getattr(base_layer, name)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if len(inputs) == 1 and not options and not torch.compiler.is_compiling():
            held = self.__dict__  # as attributes, torch would look for them elsewhere first
            activation = held["activation"]
            state = held.get("override") or activation
            if (
                state.enabled
                and len(state.active) == 1
                and activation.rows is None
                and held.get("ledger") is None
            ):
                only = held["adapters"].get(state.active[0])
                if only is not None and (y := only.shortcut(inputs[0])) is not None:
                    return y
        if self.activation.rows is not None and self.state.enabled:
            return batch.run(self, self.activation.rows, inputs, options)
        chain = self.acting()
        if not chain:
            return self.base_layer(*inputs, **options)
        if self.base.opaque:
            affine = fold(chain, self.dense())
            return self.base.op(self.base_layer, inputs, affine, (), options)
        if not inputs:
            inputs = (options.pop(self.base.first),)
        if self.parallel is None and len(chain) == 1:
            outermost = chain[-1]
            return outermost.method.forward(
                outermost, inputs[0], Beneath(self, chain[:-1], inputs[1:], options)
            )
        return self.through_processes(Beneath(self, chain, inputs[1:], options), inputs[0])

    def through_processes(self, beneath: Beneath, x: Tensor) -> Tensor:
        """The output for `x`, taken and given as the layer lies over processes, where it does."""
        return beneath(x) if self.parallel is None else self.parallel.leave(beneath(self.parallel.enter(x)))

    def through(
        self, names: Sequence[str], x: Tensor, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Tensor:
        """The output for `x` with the adapters of these names alone, whatever is active."""
        return self.through_processes(Beneath(self, self.chain(names), rest, options), x)

    def acting(self) -> Chain:
        """The adapters to run beside the weights now.

        Adapters that are merged are unmerged where none is to act.
        """
        state = self.override or self.activation
        if self.ledger is not None:
            if not state.enabled:
                self.unmerge()
            return ()
        return self.chain(state.active) if state.enabled else ()

    def chain(self, names: Sequence[str]) -> Chain:
        """The adapters of these names that are on this layer, innermost first."""
        if len(names) == 1:
            only = self.adapters.get(names[0])
            return () if only is None else (only,)
        found = [self.adapters[name] for name in names if name in self.adapters]
        chain: deque[FittedAdapter] = deque()
        for adapter in found:
            if adapter.method.side_of(adapter) is Side.INPUT:
                chain.appendleft(adapter)
            else:
                chain.append(adapter)
        return tuple(chain)

    def folded(self) -> Affine:
        """The layer as an affine map with the active adapters in it, in its own dtype; differentiable."""
        chain, base = self.acting(), self.dense()
        return as_dtype(fold(chain, base), base.weight.dtype) if chain else base

    # The frozen weights, wherever they are kept.

    @property
    def device(self) -> torch.device:
        """Where the layer computes, and its adapters belong."""
        return device_of(self.base_layer, self.weight_stored)

    @property
    def weight_stored(self) -> nn.Parameter:
        """The weight as it is stored: of device meta while it is kept elsewhere, a part where it lies over
        processes.
        """
        return self.base.parameters(self.base_layer)[0]

    def dense(self) -> Affine:
        """The frozen layer as an affine map, to be read: whole, or as a whole that lies over processes as the
        layer does.
        """
        affine = self.base.dense(self._modules["base_layer"])  # type: ignore[arg-type]
        if self.parallel is not None or not in_parts(affine.weight):
            return affine
        return Affine(whole(affine.weight), None if affine.bias is None else whole(affine.bias))

    @contextmanager
    def at_hand(self, *, write: bool = False) -> Iterator[None]:
        """Brings in weights that are kept elsewhere inside the `with`; with `write` what is put into them is
        kept.
        """
        with onloaded(self.base_layer, write=write), gathered(self.parameters(), write=write):
            yield

    def routes(self) -> dict[str, str]:
        """How each active adapter runs: "fused" with the layer beneath, or "composite: " and why."""
        found, chain = {}, self.acting()
        together = Beneath(self, (), (), {}).takes(chain)
        for place, adapter in enumerate(chain):
            fault = adapter.method.obstacle(adapter, Beneath(self, () if together else chain[:place], (), {}))
            found[adapter.name] = "fused" if fault is None else f"composite: {fault}"
        return found

    def conflict(self, names: Sequence[str]) -> str | None:
        chain = self.chain(names)
        methods = {adapter.method.name: adapter.method for adapter in chain}
        faults = [
            method.conflict([adapter for adapter in chain if adapter.method is method])
            for method in methods.values()
        ]
        return next((f"{self.spec.name}: {fault}" for fault in faults if fault), None)

    def before_switch(self, state: Activation) -> None:
        super().before_switch(state)
        here = tuple(name for name in state.active if name in self.adapters)
        if self.ledger is not None and self.ledger.names != here:
            warnings.warn(
                f"{self.spec.name}: {self.merged_adapters} were merged and are unmerged now", PeftrsWarning, 4
            )
            self.unmerge()

    def adapter_names(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    def tensors(self, adapter: str) -> list[nn.Parameter]:
        return (
            [parameter for _, parameter in self.adapters[adapter].parameters()]
            if adapter in self.adapters
            else []
        )

    def store(self, adapter: str, stores: Stores) -> None:
        fitted = self.adapters.get(adapter)
        if fitted is not None and fitted.leader is None:
            for slot in fitted.slots:
                module, name = fitted.holder(slot)
                stores.add(module._parameters, name)

    def require_grad(self, names: Sequence[str], *, only: bool = False, requires_grad: bool = True) -> None:
        """Sets whether the named adapters are trained; `only` freezes all others."""
        for name in self.adapters if only else names:
            stores = Stores()
            self.store(name, stores)
            stores.require_grad(requires_grad and name in names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes an adapter off this layer. Raises `AdapterError` while it is merged."""
        if adapter_name not in self.adapters:
            return
        if adapter_name in self.merged_adapters:
            raise AdapterError(
                f"{self.spec.name}: adapter {adapter_name!r} is merged; unmerge it before deleting it"
            )
        self.adapters[adapter_name].remove()
        del self.adapters[adapter_name]
        self.forget(adapter_name)

    # Merging.

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the weights."""
        return self.ledger is not None

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters merged into the weights, in the order in which they are active."""
        return [] if self.ledger is None else list(self.ledger.names)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merges adapters (the active ones unless named) into the weights, rounding once. See
        `peftrs.core.merge`.

        Weights that would not be finite are refused whatever `safe_merge` says. Raises `MergeError`.
        """
        names = merging.names_to_merge(self, adapter_names)
        merging.check(self, self.chain([*self.merged_adapters, *names]))
        earlier = self.merged_adapters
        merging.merge(self, names)
        try:
            merging.judge([self])
        except MergeError:
            self.unmerge()
            merging.merge(self, earlier)
            raise

    def unmerge(self) -> None:
        """Restores the bits from before the merge, whatever happened to the adapters since."""
        merging.unmerge(self)

    def _replicate_for_data_parallel(self) -> AdaptedLayer:
        replica = cast(AdaptedLayer, super()._replicate_for_data_parallel())  # type: ignore[no-untyped-call]
        replica.__dict__["adapters"] = {name: fitted.on(replica) for name, fitted in self.adapters.items()}
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        merging.before_cast(self, fn)
        return cast(AdaptedLayer, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter alone adds to the weight, in the layout and dtype in which the layer stores it."""
        fitted = self.adapters[adapter]
        tensors = [tensor for _, tensor in fitted.parameters()]
        base = Affine(*(None if one is None else alike(one, tensors) for one in self.dense()))  # type: ignore[arg-type]
        weight = fitted.method.apply(fitted, base).weight - base.weight
        return (weight.mT if self.base.transposed else weight).to(base.weight.dtype)

    # Strength.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets an adapter's strength, as a multiple of the one that its config gives."""
        if adapter in self.adapters:
            fitted = self.adapters[adapter]
            fitted.rescale(scale * fitted.own_scaling)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for adapter in self.chain(self.active_adapters):
            adapter.rescale(adapter.scaling * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters, or without `scale` sets it back to what their configs
        give.
        """
        for adapter in self.chain(self.active_adapters):
            adapter.rescale(adapter.own_scaling if scale is None else adapter.scaling / scale)

    def get_base_layer(self) -> nn.Module:
        """The frozen layer, below all layers adapted around it."""
        layer = self.base_layer
        return layer.get_base_layer() if isinstance(layer, AdaptedLayer) else layer

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The attributes that hold adapters' tensors."""
        return tuple(
            dict.fromkeys(place[0] for adapter in self.adapters.values() for place in adapter.places.values())
        )

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
        return self.spec.kind is LayerKind.LINEAR and self.base.transposed

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={adapter.method.name}" for name, adapter in self.adapters.items())


class Setting(MutableMapping[str, Any]):
    """One setting of every adapter of a layer, by adapter name: `layer.r["default"]`,
    `layer.scaling["default"] = 2.0`.
    """

    def __init__(self, adapters: dict[str, FittedAdapter], name: str) -> None:
        self.adapters = adapters
        self.name = name

    def __getitem__(self, adapter: str) -> Any:
        fitted = self.adapters[adapter]
        if self.name == "scaling":
            return fitted.scaling
        if self.name == f"{fitted.method.prefix}dropout":
            # Called, not read, by code that runs an adapter's tensors itself.
            return nn.Dropout(getattr(fitted.config, self.name)).train(fitted.layer.training)
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
