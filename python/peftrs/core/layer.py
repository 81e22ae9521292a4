"""The adapted layer: a frozen layer with adapters over it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base, as_dtype
from peftrs.bases.kinds import Affine, LayerSpec
from peftrs.bases.parallel import Parallel
from peftrs.core import merge as merging
from peftrs.core import route as routing
from peftrs.core.activation import Acting, Activation, Stores, Switched
from peftrs.core.fold import Chain, fold, ordered
from peftrs.core.frozen import BENEATH, Frozen
from peftrs.core.merge import Merge
from peftrs.core.route import Route
from peftrs.core.slots import FittedAdapter
from peftrs.core.tuner_layer import TunerLayer
from peftrs.errors import AdapterError, PeftrsWarning
from peftrs.torch_private import bare


class AdaptedLayer(TunerLayer, Switched, nn.Module):
    """A frozen layer and the adapters over it. What it does not know itself, it asks the frozen layer for."""

    frozen: Frozen
    adapters: dict[str, FittedAdapter]
    whole = False
    read_by_owner = False
    """Whether the module above reads `weight` and `bias` instead of calling the layer: it then gets the
    changed ones.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        base: Base,
        activation: Activation,
        spec: LayerSpec,
        parallel: Parallel | None = None,
    ) -> None:
        bare(self)
        modules = cast("dict[str, nn.Module]", self._modules)
        modules[BENEATH] = base_layer
        # Not one by one as attributes, each of which torch would look over for parameters and modules.
        self.__dict__ |= {
            "frozen": Frozen(modules, base, spec, parallel),
            "adapters": {},
            "override": None,
            "training": base_layer.training,
        }
        self.join(activation)

    @property
    def base_layer(self) -> nn.Module:
        """The frozen layer, or one adapted beneath this one."""
        # torch looks in three places before it finds a module among modules.
        try:
            return cast("dict[str, nn.Module]", self._modules)[BENEATH]
        except KeyError:
            raise AttributeError(BENEATH) from None

    @base_layer.setter
    def base_layer(self, module: nn.Module) -> None:
        self.frozen.module = module

    @property
    def base(self) -> Base:
        """What kind of layer the frozen one is."""
        return self.frozen.base

    @property
    def spec(self) -> LayerSpec:
        """What was known of it before it was adapted."""
        return self.frozen.spec

    def forward(self, *inputs: Any, **options: Any) -> Any:
        held = self.__dict__  # as attributes, torch would look for them elsewhere first
        acting = (held["override"] or held["activation"]).acting
        if torch.compiler.is_compiling():
            self._make_ready(acting)
            return routing.traced(self.frozen, self.adapters, acting, self.training, inputs, options)
        known, route = held["frozen"].routed
        if known is not acting:
            route = self.route()
        return route.run(inputs, options)

    def route(self, *, anew: bool = False) -> Route:
        """How the layer runs now; with `anew` it is decided again, for what torch may have changed unseen
        since.
        """
        frozen, acting = self.frozen, self.state.acting
        self._make_ready(acting)
        if anew:
            frozen.changed()
        key = (acting.active, acting.enabled, acting.gate is not None)
        route = frozen.routes.get(key)
        if route is None:
            route = frozen.routes[key] = routing.decide(frozen, self.adapters, acting, self.__dict__)
        frozen.routed = acting, route
        return cast(Route, route)

    def routes(self) -> dict[str, str]:
        """How each active adapter runs, by the route that the layer takes: "fused", or "composite: " and
        why.
        """
        ways = self.route(anew=True).ways
        return {name: "fused" if why is None else f"composite: {why}" for name, why in ways.items()}

    def _make_ready(self, acting: Acting) -> None:
        """Unmerges where no adapter is to act."""
        if self.frozen.ledger is not None and not acting.enabled:
            self.unmerge()

    def chain(self, names: Sequence[str]) -> Chain:
        """The adapters of these names that are on this layer, innermost first."""
        return ordered(self.adapters, names)

    def folded(self) -> Affine:
        """The layer as an affine map with the active adapters in it, in its own dtype; differentiable."""
        acting = self.state.acting
        self._make_ready(acting)
        chain, base = routing.chain_of(self.frozen, self.adapters, acting), self.frozen.dense()
        return as_dtype(fold(chain, base), base.weight.dtype) if chain else base

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
        here = [name for name in state.active if name in self.adapters]
        if self.merged and self.merged_adapters != here:
            text = f"{self.spec.name}: {self.merged_adapters} were merged and are unmerged now"
            warnings.warn(text, PeftrsWarning, 4)
            self.unmerge()

    def is_merged(self) -> bool:
        return self.frozen.ledger is not None

    def adapter_names(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    def tensors(self, adapter: str) -> list[nn.Parameter]:
        fitted = self.adapters.get(adapter)
        return [] if fitted is None else [parameter for _, parameter in fitted.parameters()]

    def store(self, adapter: str, stores: Stores) -> None:
        fitted = self.adapters.get(adapter)
        if fitted is not None:
            for slot in fitted.places:
                if fitted.kinds[slot].trained:
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

    def rename_adapter(self, name: str, other: str) -> None:
        """Gives an adapter another name on this layer. Whoever holds that must be gone."""
        fitted = self.adapters.pop(name)
        fitted.rename(other)
        self.adapters[other] = fitted

    def merging(self, names: Sequence[str]) -> Merge:
        """What merging these adapters beside those that are merged already would be."""
        earlier = self.merged_adapters
        together = tuple(dict.fromkeys([*earlier, *names]))
        return Merge(self.frozen, together, self.chain(together), self.chain(earlier))

    def to_merge(self, names: Sequence[str] | None) -> list[str]:
        """The adapters to merge that are not merged yet: those named, else the active ones."""
        if isinstance(names, str):
            raise TypeError(f"adapter_names must be a list of names, not the string {names!r}")
        wanted = self.active_adapters if names is None else names
        return [name for name in wanted if name in self.adapters and name not in self.merged_adapters]

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merges adapters (the active ones unless named) into the weights, rounding once. See
        `peftrs.core.merge`.

        Weights that would not be finite are refused whatever `safe_merge` says. Raises `MergeError`.
        """
        names = self.to_merge(adapter_names)
        if names:
            self.activation.merged = True
            merging.merge([self.merging(names)])

    def unmerge(self) -> None:
        """Restores the bits from before the merge, whatever happened to the adapters since."""
        merging.unmerge(self.frozen)

    def _replicate_for_data_parallel(self) -> AdaptedLayer:
        replica = cast(AdaptedLayer, super()._replicate_for_data_parallel())  # type: ignore[no-untyped-call]
        frozen = self.frozen.on(cast("dict[str, nn.Module]", replica._modules))
        replica.__dict__["frozen"] = frozen
        replica.__dict__["adapters"] = {name: fitted.on(frozen) for name, fitted in self.adapters.items()}
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        merging.before_cast(self.frozen, fn)
        return cast(AdaptedLayer, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]
