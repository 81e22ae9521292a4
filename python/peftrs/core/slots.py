"""An adapter on one layer, and where its tensors live: as real parameters of the layer, slot first, then
adapter.

A slot is named as files name it: `lora_A.weight` is the leaf `weight` of the container `lora_A`, `ia3_l` is a
container whose entries are the tensors themselves. In memory the adapter's name stands after the container's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases import offload
from peftrs.bases.kinds import LayerSpec
from peftrs.bases.sharded import is_distributed
from peftrs.core.activation import Activation
from peftrs.core.containers import Container, Entries, Leaves
from peftrs.core.frozen import Frozen
from peftrs.core.method import Method, Slot
from peftrs.errors import AdapterError
from peftrs.torch_private import bare


class FittedAdapter:
    """One adapter on one layer: what its method sees of it, and its name, which the method does not."""

    def __init__(
        self,
        name: str,
        method: Method,
        config: Any,
        spec: LayerSpec,
        values: dict[str, Any],
        frozen: Frozen,
        activation: Activation,
        siblings: Mapping[str, FittedAdapter],
    ) -> None:
        self.name = name
        self.method = method
        self.config = config
        self.spec = spec
        self.frozen = frozen
        """The layer beneath, whose table of modules holds the adapter's tensors too."""
        self.activation = activation
        self.places: dict[str, tuple[str, str]] = {}
        """Where the adapter's own tensors are, by slot: the container and the leaf in it."""
        self.settle(values)
        self.siblings = {
            slot.of.layer: siblings[slot.of.layer] for slot in self.kinds.values() if slot.of is not None
        }
        """The same adapter on the layers whose tensors this one shares."""
        self.scaling: Any = self.own_scaling
        """The strength: a number, or a tensor where it is to change under compiled code."""

    def settle(self, values: dict[str, Any]) -> None:
        """Sets the layer's settings, and what its slots are by them."""
        self.values = values
        self.kinds = self.method.kinds(self.config, self.spec, values)

    def on(self, frozen: Frozen) -> FittedAdapter:
        """The same on a replica of the layer, as `nn.DataParallel` makes them.

        Raises `AdapterError` where tensors are shared.
        """
        if self.siblings:
            raise AdapterError(
                f"{self.spec.name}: adapter {self.name!r} shares the tensors of {next(iter(self.siblings))},"
                " which nn.DataParallel cannot replicate; hint: use DistributedDataParallel, or one device"
            )
        twin = copy.copy(self)
        twin.frozen = frozen
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
    def shares(self) -> bool:
        """Whether its tensors are those of another layer."""
        return bool(self.siblings)

    def __getitem__(self, slot: str) -> Tensor:
        place = self.places.get(slot)
        if place is None:
            of = self.kinds[slot].of
            if of is None:
                raise KeyError(slot)
            tensor = self.siblings[of.layer][of.slot]
            return tensor.mT if of.transposed else tensor
        # What `holder` finds, without a call more: asked several times at every step of every layer.
        container, leaf = place
        holder: Any = self.frozen.modules[container]
        found: nn.Parameter | None = (
            holder._modules[self.name]._parameters.get(leaf) if leaf else holder._parameters.get(self.name)
        )
        if found is None or found.is_meta:
            found = self.raw(slot)
            return offload.fetched(self.holder(slot)[0], found) if found.is_meta else found
        return found

    def holder(self, slot: str) -> tuple[nn.Module, str]:
        """The module that holds a slot's parameter, and its name there."""
        container, leaf = self.places[slot]
        # Not by attribute, which would be looked for in three places before it is found here.
        held: Any = self.frozen.modules[container]
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
        try:
            return self[slot]
        except KeyError:
            return None

    def __contains__(self, slot: object) -> bool:
        return slot in self.places or (slot in self.kinds and self.kinds[slot].of is not None)

    def __setitem__(self, slot: str, parameter: nn.Parameter) -> None:
        container, _, leaf = slot.partition(".")
        modules = self.frozen.modules
        held = modules.get(container)
        if held is None:
            if leaf:
                bare(held := Container.__new__(Container))
            else:
                held = Entries()
            # `add_module` would find the container of a layer adapted beneath this one, which answers for
            # what this one lacks.
            modules[container] = held
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
            self.kinds.setdefault(slot, Slot(tuple(parameter.shape)))
            self.changed()

    def changed(self) -> None:
        """Tells whoever keeps track of tensors that they come or go."""
        self.activation.change(self.name)
        self.frozen.changed()

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This layer's own tensors that are saved, by slot; none where it shares those of another."""
        for slot, kind in self.kinds.items():
            if kind.saved and kind.of is None:
                yield slot, self.raw(slot)

    def full_name(self, slot: str) -> str:
        """The slot's name in the layer's `state_dict`."""
        container, leaf = self.places[slot]
        return f"{container}.{self.name}.{leaf}" if leaf else f"{container}.{self.name}"

    def rename(self, name: str) -> None:
        """Gives the adapter another name on this layer. Whoever holds the name must be gone."""
        for container in {place[0] for place in self.places.values()}:
            held = cast("nn.ModuleDict | nn.ParameterDict", self.frozen.modules[container])
            held[name] = held.pop(self.name)
        self.changed()
        self.name = name
        self.changed()

    def remove(self) -> None:
        """Takes the adapter's tensors off the layer, and the containers that this leaves empty."""
        modules = self.frozen.modules
        for container in {place[0] for place in self.places.values()}:
            held = cast("nn.ModuleDict | nn.ParameterDict", modules[container])
            del held[self.name]
            if not len(held):
                del modules[container]
        self.places.clear()
        self.changed()

    def spread(self) -> None:
        """Spreads the tensors over processes as the layer is spread, if it is: along what follows the layer's
        own slices.
        """
        parallel = self.frozen.parallel
        if parallel is None:
            return
        place = len(self.spec.shape) - (1 if parallel.by_inputs else 2)
        wider = tuple(size * (1 + (at == place)) for at, size in enumerate(self.spec.shape))
        other = self.method.kinds(self.config, replace(self.spec, shape=wider), self.values)
        for slot in self.places:
            held = self[slot]
            if not held.is_meta and not is_distributed(held):
                sizes = zip(self.kinds[slot].shape, other[slot].shape, strict=True)
                following = next((at for at, (size, more) in enumerate(sizes) if size != more), None)
                self[slot] = nn.Parameter(parallel.spread(held, following), requires_grad=held.requires_grad)

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the slots that are the layer's own, not yet filled."""
        for slot, kind in self.kinds.items():
            if kind.of is None:
                value = torch.empty(kind.shape, dtype=kind.dtype or dtype, device=device)
                self[slot] = nn.Parameter(value, requires_grad=kind.trained)
