"""Where an adapter's tensors live: as real parameters of the layer, slot first, then adapter
(`lora_A.default.weight`).

A slot is named as files name it: `lora_A.weight` is the leaf `weight` of the container `lora_A`, `ia3_l` is a
container whose entries are the tensors themselves. In memory the adapter's name stands after the container's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftrs.bases import offload
from peftrs.bases.kinds import LayerSpec
from peftrs.bases.sharded import is_distributed
from peftrs.core.method import Method
from peftrs.core.shortcut import Shortcut, shortcut
from peftrs.errors import AdapterError

if TYPE_CHECKING:
    from peftrs.core.layer import AdaptedLayer

ORIGIN = "origin_"
"""How the containers of tensors begin that are neither trained nor saved, since they follow from the base."""


_EMPTY = nn.Module().__dict__
_OWN = {name: type(value) for name, value in _EMPTY.items() if isinstance(value, dict | set)}


def empty(module: nn.Module) -> None:
    """What `nn.Module.__init__` does, in a third of its time: a layer has five modules, and a model hundreds
    of layers.
    """
    attributes = module.__dict__
    attributes.update(_EMPTY)
    for name, kind in _OWN.items():
        attributes[name] = kind()


SIDES = {"out_features": 0, "in_features": 1}
"""The dimension of a weight that each is the size of."""


class Leaves(nn.Module):
    """The tensors of one adapter in one container, by leaf name."""

    def __init__(self) -> None:
        empty(self)
        # Linear maps without a bias have one that is None, and code asks for it.
        self._parameters["bias"] = None

    def forward(self, x: Tensor) -> Tensor:
        """The linear map that a `weight` of two dimensions is, for code that calls `layer.lora_A[name]` and
        its like itself.
        """
        weight, bias = (cast("Tensor | None", self._parameters.get(leaf)) for leaf in ("weight", "bias"))
        if weight is None or weight.ndim != 2:
            raise NotImplementedError(
                f"{self.extra_repr()}: only a weight of two dimensions is a map by itself; call the layer"
            )
        return functional.linear(x, weight, bias)

    def __getattr__(self, name: str) -> Any:
        # What code asks the linear map for that it takes this to be.
        if name in SIDES and (weight := self._parameters.get("weight")) is not None and weight.ndim > 1:
            return weight.shape[SIDES[name]]
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in self.named_parameters())


class Container(nn.ModuleDict):
    """The tensors of all adapters in one container."""

    def __getattr__(self, name: str) -> Any:
        held: dict[str, Leaves] = self.__dict__.get("_modules", {})
        found = {
            adapter: leaves._parameters[name]
            for adapter, leaves in held.items()
            if name in leaves._parameters
        }
        # PEFT has the leaf before the adapter where it is not a linear map's.
        if found and name not in held and name not in ("weight", "bias"):
            return found
        return super().__getattr__(name)


class Entries(nn.ParameterDict):
    """A container whose entries are the tensors themselves, one an adapter."""

    # torch's own warns that a replica appears empty: slots are looked up as attributes, which replicas have.
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel


class FittedAdapter:
    """One adapter on one layer: what its method sees of it, and its name, which the method does not."""

    def __init__(self, layer: AdaptedLayer, name: str, method: Method, config: Any, spec: LayerSpec) -> None:
        self.layer = layer
        self.name = name
        self.method = method
        self.config = config
        self.spec = spec
        self.values = method.settle(config, spec)
        self.scaling: Any = self.own_scaling
        """The strength: a number, or a tensor where it is to change under compiled code."""
        self.places: dict[str, tuple[str, str]] = {}
        self.leader: FittedAdapter | None = None
        """The adapter whose tensors this one shares, on the layer that this one's is tied to."""

    @cached_property
    def shortcut(self) -> Shortcut:
        """The way of small inputs through the layer with this adapter alone."""
        return shortcut(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks up its own.
        return {name: value for name, value in self.__dict__.items() if name != "shortcut"}

    def on(self, replica: AdaptedLayer) -> FittedAdapter:
        """The same on a replica of the layer, as `nn.DataParallel` makes them.

        Raises `AdapterError` where tensors are shared.
        """
        if self.leader is not None:
            raise AdapterError(
                f"{self.spec.name}: adapter {self.name!r} shares the tensors of {self.leader.spec.name},"
                " which nn.DataParallel cannot replicate; hint: use DistributedDataParallel, or one device"
            )
        twin = copy.copy(self)
        twin.layer = replica
        return twin

    def rescale(self, scaling: float) -> None:
        """Sets the strength; in place where it is a tensor, so that what was compiled with it goes on being
        right.
        """
        if isinstance(self.scaling, Tensor):
            self.scaling.fill_(scaling)
        else:
            self.scaling = scaling

    @property
    def own_scaling(self) -> float:
        """The scaling that the config gives this layer."""
        return self.method.scale(self.config, self.values) * self.spec.strength

    @property
    def slots(self) -> list[str]:
        """The slots that are trained and saved."""
        if self.leader is not None:
            return list(self.method.tied_slots)
        return [slot for slot in self.places if not slot.startswith(ORIGIN)]

    def __getitem__(self, slot: str) -> Tensor:
        if self.leader is not None:
            leading, transposed = self.method.tied_slots[slot]
            return self.leader[leading].mT if transposed else self.leader[leading]
        # What `holder` finds, without a call more: asked several times at every step of every layer.
        container, leaf = self.places[slot]
        holder: Any = self.layer._modules[container]
        tensor: nn.Parameter | None = (
            holder._modules[self.name]._parameters.get(leaf) if leaf else holder._parameters.get(self.name)
        )
        if tensor is None or tensor.is_meta:
            tensor = self.raw(slot)
            return offload.fetched(self.holder(slot)[0], tensor) if tensor.is_meta else tensor
        return tensor

    def holder(self, slot: str) -> tuple[nn.Module, str]:
        """The module that holds a slot's parameter, and its name there."""
        container, leaf = self.places[slot]
        # Not by attribute, which would be looked for in three places before it is found here.
        held: Any = self.layer._modules[container]
        return (held._modules[self.name], leaf) if leaf else (held, self.name)

    def raw(self, slot: str) -> nn.Parameter:
        """The parameter of a slot itself, which is on the device meta while a library keeps its values
        elsewhere.
        """
        holder, name = self.holder(slot)
        tensor = holder._parameters.get(name)
        # Libraries that gather parameters for a while hang them beside the registered ones.
        return cast(nn.Parameter, getattr(holder, name) if tensor is None else tensor)

    def get(self, slot: str) -> Tensor | None:
        """The tensor of a slot, or None if this adapter has no such slot."""
        held = self.places if self.leader is None else self.method.tied_slots
        return self[slot] if slot in held else None

    def __contains__(self, slot: object) -> bool:
        return slot in (self.places if self.leader is None else self.method.tied_slots)

    def __setitem__(self, slot: str, parameter: nn.Parameter) -> None:
        container, _, leaf = slot.partition(".")
        held = self.layer._modules.get(container)
        if held is None:
            if leaf:
                empty(held := Container.__new__(Container))
            else:
                held = Entries()
            # `add_module` would find the container of a layer adapted beneath this one, which answers for
            # what this one lacks.
            self.layer._modules[container] = held
        if leaf:
            leaves = held._modules.get(self.name)
            if leaves is None:
                # The name is known to be good: `add_module` would look for it among all attributes.
                leaves = held._modules[self.name] = Leaves()
            leaves._parameters[leaf] = parameter
        else:
            cast(nn.ParameterDict, held)[self.name] = parameter
        if slot not in self.places:
            self.places[slot] = (container, leaf)
            self.layer.activation.change(self.name)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This layer's own trained and saved tensors by slot; none where it shares those of another."""
        for slot in self.slots if self.leader is None else ():
            yield slot, self.raw(slot)

    def full_name(self, slot: str) -> str:
        """The slot's name in the layer's `state_dict`."""
        container, leaf = self.places[slot]
        return f"{container}.{self.name}.{leaf}" if leaf else f"{container}.{self.name}"

    def rename(self, name: str) -> None:
        """Gives the adapter another name on this layer. Whoever holds the name must be gone."""
        for container in {place[0] for place in self.places.values()}:
            held = cast("nn.ModuleDict | nn.ParameterDict", self.layer._modules[container])
            held[name] = held.pop(self.name)
        for one in (self.name, name):
            self.layer.activation.change(one)
        del self.layer.adapters[self.name]
        self.layer.adapters[name] = self
        self.name = name

    def remove(self) -> None:
        """Takes the adapter's tensors off the layer, and the containers that this leaves empty."""
        for container in {place[0] for place in self.places.values()}:
            held = cast("nn.ModuleDict | nn.ParameterDict", getattr(self.layer, container))
            del held[self.name]
            if not len(held):
                delattr(self.layer, container)
        self.places.clear()
        self.layer.activation.change(self.name)

    def spread(self) -> None:
        """Spreads the tensors over processes as the layer is spread, if it is: along what follows the layer's
        own slices.
        """
        parallel = self.layer.parallel
        if parallel is None:
            return
        place = len(self.spec.shape) - (1 if parallel.by_inputs else 2)
        wider = tuple(size * (1 + (at == place)) for at, size in enumerate(self.spec.shape))
        shapes = [
            self.method.slots(self.config, spec, self.values)
            for spec in (self.spec, replace(self.spec, shape=wider))
        ]
        for slot in self.places:
            held = self[slot]
            if not held.is_meta and not is_distributed(held):
                sizes = zip(*(one[slot] for one in shapes), strict=True) if slot in shapes[0] else ()
                following = next((at for at, (size, other) in enumerate(sizes) if size != other), None)
                self[slot] = nn.Parameter(parallel.spread(held, following), requires_grad=held.requires_grad)

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the slots, not yet filled."""
        for slot, shape in self.method.slots(self.config, self.spec, self.values).items():
            self[slot] = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
