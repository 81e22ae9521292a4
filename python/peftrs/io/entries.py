"""What an adapter's file holds, told from the model's structure: each tensor's name in the file, in memory,
and where it goes.

An adapter's tensors are found by walking its layers, never by looking for its name in other names, so that
neither an adapter called "0" nor a layer called "lora_head" is mistaken for something else.

Names in the file are those of the model with this adapter alone: which modules others wrap besides must not
tell in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from peftrs.bases import offload
from peftrs.bases.sharded import overwrite
from peftrs.bases.sharded import shape as whole_shape
from peftrs.config import TargetedConfig
from peftrs.core.frozen import Frozen
from peftrs.core.inject import biases
from peftrs.core.layer import AdaptedLayer
from peftrs.core.merge import originals
from peftrs.core.prompt import Prompts, home_of
from peftrs.core.prompt_call import word_embeddings
from peftrs.core.replace import ReplacedModule
from peftrs.core.slots import FittedAdapter
from peftrs.core.tree import Holder, Wrapped, embedding_layers, modules, places, wrappers
from peftrs.io.checkpoint import PREFIX

SHORT_PREFIX = "base_model."
"""How names in prompts' files begin: PEFT puts no tuner between its model and the user's there."""

WRAPPINGS = ("_orig_mod.", "_fsdp_wrapped_module.")
"""What other libraries put into the names of modules that they wrap."""


@dataclass(frozen=True)
class Entry:
    """One tensor of an adapter, or of the base where its file may hold those.

    `required` entries belong to every file of the adapter. `shown` is the tensor to save; `bind` puts a
    loaded one in its place.
    """

    key: str
    """The name in the file."""
    name: str
    """The name in the model's `state_dict`."""
    shown: Tensor
    bind: Callable[[Tensor], None]
    required: bool = True
    transposed: bool = False
    """Whether the tensor in the `state_dict` is the transpose of the file's."""
    owner: FittedAdapter | None = None
    """The adapter that this is a slot of."""
    slot: str = ""

    undeclared: bool = False
    """Whether it is the base's own, in a file that the adapter's config does not announce it in."""

    vital: bool = False
    """Whether nothing but the file can give it values."""

    computed: bool = False
    """Whether it is made of the model's tensors, so that no `state_dict` holds it."""

    again: tuple[str, ...] = ()
    """Other names under which a file may hold the same values once more, which are not read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the file's tensor has: that of the slot, whatever part of it a process holds."""
        if self.owner is None:
            return whole_shape(self.shown)
        return self.owner.kinds[self.slot].shape

    @property
    def empty(self) -> bool:
        """Whether the model still waits for the values."""
        return self.shown.device.type == "meta"


def plain(name: str) -> str:
    """A name without what wrapping libraries put into it."""
    for wrapping in WRAPPINGS:
        name = name.replace(wrapping, "")
    return name


def entries(model: nn.Module, adapter: str, config: TargetedConfig) -> Iterator[Entry]:
    """Every tensor that the adapter's file holds by its config; embeddings of the base apart."""
    held = [(plain(path), wrapper) for path, wrapper in wrappers(model)]
    paths = {wrapper.frozen: path for path, wrapper in held if isinstance(wrapper, AdaptedLayer)}
    alone = _alone(held, adapter)
    # Where tied layers are written too, so is one layer under all of its names.
    others = (
        {place.module: [plain(other.name) for other in place.also] for place in list(places(model))}
        if config.ensure_weight_tying
        else {}
    )
    for path, wrapper in held:
        if isinstance(wrapper, Prompts):
            yield from _prompt(model, path, wrapper, adapter)
        elif isinstance(wrapper, ReplacedModule):
            own = alone(path)
            file = (
                f"{SHORT_PREFIX}{own.removeprefix(PREFIX)}"
                if config.is_prompt_learning and own.startswith(PREFIX)
                else own
            )
            for inner, name, tensor in wrapper.parameters_of(adapter):
                # PEFT writes these biases once more where it writes all biases.
                again = (f"{own}.modules_to_save.{inner}",) if inner.endswith("bias") else ()
                yield Entry(
                    f"{file}.{inner}", f"{path}.{name}", tensor, partial(overwrite, tensor), again=again
                )
        elif adapter in wrapper.adapters:
            fitted = wrapper.adapters[adapter]
            if not fitted.shares:
                yield from _slots(alone(path), path, fitted)
                for other in others.get(wrapper, ()):
                    yield from _same_slots(other, path, fitted)
            else:
                yield from _shared_slots(alone(path), fitted, paths)
    before = _before_merging(held)
    for name, bias in biases(model, config):
        name = plain(name)
        key = alone(name)
        yield Entry(
            key,
            name,
            before.get(id(bias), bias),
            partial(overwrite, bias),
            required=".original_module." not in key,
        )


def _alone(held: Iterable[tuple[str, Holder]], adapter: str) -> Callable[[str], str]:
    """What makes of a name in memory the one without the steps into wrappers that only other adapters
    need.
    """
    others = {
        f"{path}.{_inner(wrapper)}"
        for path, wrapper in held
        if not isinstance(wrapper, Prompts) and adapter not in wrapper.adapter_names()
    }

    def alone(name: str) -> str:
        if not others:
            return name
        parts = name.split(".")
        return ".".join(part for at, part in enumerate(parts) if ".".join(parts[: at + 1]) not in others)

    return alone


def _inner(wrapper: Wrapped) -> str:
    """The attribute under which a wrapper has what it goes around."""
    return "base_layer" if isinstance(wrapper, AdaptedLayer) else "original_module"


def _prompt(model: nn.Module, path: str, prompts: Prompts, adapter: str) -> Iterator[Entry]:
    if adapter not in prompts:
        return
    encoder = prompts.encoder(adapter)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    for key, tensor in encoder.saved().items():
        own = names.get(id(tensor))
        home = home_of(word_embeddings(model))
        bind = partial(encoder.load, key, home=home)
        yield Entry(key, f"{path}.{adapter}.{own or key}", tensor, bind, vital=True, computed=own is None)


def _before_merging(held: Iterable[tuple[str, Holder]]) -> dict[int, Tensor]:
    """The layers' biases as they were before adapters were merged into them, by the identity of the
    parameter.
    """
    layers = [wrapper for _, wrapper in held if isinstance(wrapper, AdaptedLayer) and wrapper.merged]
    return {
        id(bias): was
        for layer in layers
        for at, (bias, was) in enumerate(zip(layer.frozen.stored, originals(layer.frozen), strict=True))
        if at > 0
    }


def _slots(file: str, path: str, fitted: FittedAdapter) -> Iterator[Entry]:
    for slot, _ in fitted.parameters():
        name = f"{path}.{fitted.full_name(slot)}"
        yield Entry(
            f"{file}.{slot}", name, fitted[slot], partial(_bind_slot, fitted, slot), owner=fitted, slot=slot
        )


def _same_slots(other: str, path: str, fitted: FittedAdapter) -> Iterator[Entry]:
    """The tensors of a layer that hangs in another place as well, under its name there."""
    for slot, _ in fitted.parameters():
        yield Entry(
            f"{other}.{slot}", f"{path}.{fitted.full_name(slot)}", fitted[slot], _leave, required=False
        )


def _shared_slots(file: str, fitted: FittedAdapter, paths: Mapping[Frozen, str]) -> Iterator[Entry]:
    """The tensors of a layer tied to another: written under both names, in memory the other's alone, whose
    entry binds them.
    """
    for slot, kind in fitted.kinds.items():
        if kind.of is not None and kind.saved:
            leader = fitted.siblings[kind.of.layer]
            name = f"{paths[leader.frozen]}.{leader.full_name(kind.of.slot)}"
            transposed = kind.of.transposed
            yield Entry(f"{file}.{slot}", name, fitted[slot], _leave, required=False, transposed=transposed)


def _bind_slot(fitted: FittedAdapter, slot: str, value: Tensor) -> None:
    holder, name = fitted.holder(slot)
    held = fitted.raw(slot)
    if offload.hook_of(holder) is not None and held.is_meta:
        offload.put(holder, name, value.to(held.dtype))
    elif held.device.type == "meta":
        fitted[slot] = nn.Parameter(
            value.to(device_of(fitted.frozen), held.dtype), requires_grad=held.requires_grad
        )
        fitted.spread()
    else:
        overwrite(held, value)


def _leave(value: Tensor) -> None:
    """Nothing: the tensor is another entry's."""


def device_of(layer: Frozen) -> torch.device:
    """Where a layer's adapters belong: beside its weight, or on the CPU while that is still to be loaded."""
    return torch.device("cpu") if layer.device.type == "meta" else layer.device


def embeddings(model: nn.Module, adapter: str, *, targeted: bool = False) -> Iterator[Entry]:
    """The tensors of the model's input and output embeddings; with `targeted` only of those that the adapter
    adapts.
    """
    held = [(plain(path), wrapper) for path, wrapper in wrappers(model)]
    alone, before = _alone(held, adapter), _before_merging(held)
    for module in embedding_layers(model):
        path = next((plain(name) for name, other in modules(model) if other is module), None)
        if (
            module is None
            or path is None
            or (isinstance(module, ReplacedModule) and adapter in module.adapter_names())
        ):
            continue
        own = None
        while isinstance(module, Wrapped):
            own = module.adapters.get(adapter, own) if isinstance(module, AdaptedLayer) else own
            path = f"{path}.{_inner(module)}"
            module = cast(nn.Module, module._modules[_inner(module)])
        if targeted and own is None:
            continue
        file = alone(path)
        if own is not None and not own.method.public:
            # PEFT wraps an embedding of which only rows are trained in another way.
            file = f"{file.removesuffix('base_layer')}original_module"
        for leaf, tensor in module.named_parameters(recurse=False):
            shown = before.get(id(tensor), tensor)
            bind = partial(overwrite, tensor)
            yield Entry(
                f"{file}.{leaf}", f"{path}.{leaf}", shown, bind, required=False, undeclared=own is None
            )
