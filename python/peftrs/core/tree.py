"""Walking a model as its user knows it: by the names from before any layer was adapted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from peftrs.core.layer import AdaptedLayer
from peftrs.core.prompt import Prompts
from peftrs.core.replace import ReplacedModule

Wrapped = AdaptedLayer | ReplacedModule
Holder = Wrapped | Prompts
"""What holds adapters' tensors."""


@dataclass(frozen=True)
class Place:
    """A module of the model: its name, itself (the outermost wrapper if it is adapted), and where it hangs."""

    name: str
    module: nn.Module
    parent: nn.Module
    attribute: str

    def put(self, module: nn.Module) -> None:
        """Puts another module in this one's place."""
        setattr(self.parent, self.attribute, module)


def places(model: nn.Module) -> Iterator[Place]:
    """Every module below the root, parents first, each once; inside wrappers only what the original module holds."""
    seen: set[int] = {id(model)}
    yield from _places(model, "", seen)


def _places(parent: nn.Module, prefix: str, seen: set[int]) -> Iterator[Place]:
    for attribute, module in parent.named_children():
        if id(module) in seen or isinstance(module, Prompts):
            continue
        seen.add(id(module))
        name = prefix + attribute
        yield Place(name, module, parent, attribute)
        inner = original(module)
        seen.add(id(inner))
        yield from _places(inner, f"{name}.", seen)


def original(module: nn.Module) -> nn.Module:
    """The module under all wrappers."""
    while isinstance(module, Wrapped):
        module = module.base_layer if isinstance(module, AdaptedLayer) else module.original_module
    return module


def wrappers(model: nn.Module) -> Iterator[tuple[str, Holder]]:
    """Every adapted layer and replaced module, and the model's prompts, with its full name in memory."""
    for name, module in model.named_modules():
        if isinstance(module, Holder):
            yield name, module


def adapted_layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    """Every adapted layer."""
    return (module for module in model.modules() if isinstance(module, AdaptedLayer))
