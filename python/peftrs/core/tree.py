"""Walking a model as its user knows it: by the names from before any layer was adapted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

from torch import nn

from peftrs.core.layer import AdaptedLayer
from peftrs.core.prompt import Prompts
from peftrs.core.replace import ReplacedModule

Wrapped = AdaptedLayer | ReplacedModule
Holder = Wrapped | Prompts
"""What holds adapters' tensors."""
_WRAPPED = (AdaptedLayer, ReplacedModule)  # told from others faster than by the union
_HOLDER = (*_WRAPPED, Prompts)


class Place(NamedTuple):
    """A module of the model: its name, itself (the outermost wrapper if it is adapted), and where it
    hangs.
    """

    name: str
    module: nn.Module
    parent: nn.Module
    attribute: str
    also: list[Place]
    """Where else it hangs, as far as the walk has come: one module may be called in several places of a
    model.
    """

    def put(self, module: nn.Module) -> None:
        """Puts another module in this one's place, and wherever else it hangs."""
        for place in (self, *self.also):
            place.parent._modules[place.attribute] = module


def places(model: nn.Module) -> Iterator[Place]:
    """Every module below the root, parents first, each once; inside wrappers only what the original module
    holds.
    """
    seen: dict[int, Place | None] = {id(model): None}
    # Not by recursion, which would pass every module up through every level.
    waiting = _children(model, "")
    while waiting:
        place = waiting.pop()
        module = place.module
        if isinstance(module, Prompts):
            continue
        if id(module) in seen:
            first = seen[id(module)]
            if first is not None:
                first.also.append(place)
            continue
        inner = original(module)
        seen[id(inner)] = None
        seen[id(module)] = place
        if inner._modules:
            waiting += _children(inner, f"{place.name}.")
        yield place


def _children(parent: nn.Module, prefix: str) -> list[Place]:
    """The last first."""
    return [
        Place(prefix + attribute, module, parent, attribute, [])
        for attribute, module in reversed(parent._modules.items())
        if module is not None
    ]


def original(module: nn.Module) -> nn.Module:
    """The module under all wrappers."""
    while isinstance(module, _WRAPPED):
        module = module.base_layer if isinstance(module, AdaptedLayer) else module.original_module
    return module


def users_model(model: nn.Module) -> nn.Module:
    """The user's model, with adapters in it or not: what is inside a `PeftModel`, and any other as it is."""
    getter: Any = getattr(model, "get_base_model", None)
    return model if getter is None else cast(nn.Module, getter())


def embedding_layers(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """What the model says embeds its inputs, and what turns its states into outputs; None where it does not
    say.
    """

    def said(getter: str) -> nn.Module | None:
        try:
            return cast("nn.Module | None", getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            return None

    return said("get_input_embeddings"), said("get_output_embeddings")


def uncompiled(model: nn.Module) -> nn.Module:
    """The model beneath what `torch.compile` put around it, which hands attributes on to it."""
    return cast(nn.Module, model._modules.get("_orig_mod", model))


def wrappers(model: nn.Module) -> Iterator[tuple[str, Holder]]:
    """Every adapted layer and replaced module, and the model's prompts, with its full name in memory."""
    return ((name, module) for name, module in modules(model) if isinstance(module, _HOLDER))


def first_wrapper(model: nn.Module) -> Holder | None:
    """Any of the wrappers of a model, the sooner found the earlier it stands: what all share can be asked of
    each.
    """
    seen: set[int] = set()
    waiting = [iter((model,))]
    while waiting:
        module = next(waiting[-1], waiting)
        if module is waiting:
            waiting.pop()
        elif isinstance(module, _HOLDER):
            return module
        elif isinstance(module, nn.Module) and module._modules and id(module) not in seen:
            seen.add(id(module))
            waiting.append(iter(module._modules.values()))  # type: ignore[arg-type]
    return None


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its full name in memory, parents first, each once, but for what adapters hold
    themselves.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children: Iterable[tuple[str, nn.Module | None]] = module._modules.items()
        yield name, module
        if isinstance(module, _HOLDER):
            children = () if isinstance(module, Prompts) else [_beneath(module)]
        elif not children:
            continue
        prefix = f"{name}." if name else ""
        waiting += [
            (prefix + attribute, child) for attribute, child in reversed(list(children)) if child is not None
        ]


def _beneath(module: Wrapped) -> tuple[str, nn.Module]:
    if isinstance(module, AdaptedLayer):
        return "base_layer", module.base_layer
    return "original_module", module.original_module


def adapted_layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    """Every adapted layer."""
    return (wrapper for _, wrapper in wrappers(model) if isinstance(wrapper, AdaptedLayer))
