"""Growing a decoder by repeating its layers (`layer_replication`): the copies share the weights and get
adapters of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftrs.core.tree import Place
from peftrs.errors import ConfigError

LISTS = ("layers", "encoder.layer", "h")
"""Where the models that can be grown keep their layers: Llama and its kin, BERT, Falcon."""


@dataclass(frozen=True)
class LayerList:
    """A list of layers and where it hangs."""

    owner: nn.Module
    attribute: str
    layers: nn.ModuleList

    def restore(self) -> None:
        """Puts this list back where another took its place."""
        if getattr(self.owner, self.attribute) is not self.layers:
            setattr(self.owner, self.attribute, self.layers)
            _tell(self.owner, len(self.layers))


def layer_lists(found: Iterable[Place]) -> list[LayerList]:
    """Every list of layers among a model's modules as they are now."""
    return [
        LayerList(place.parent, place.attribute, place.module)
        for place in found
        if isinstance(place.module, nn.ModuleList)
    ]


def replicate(model: nn.Module, layer_map: Sequence[Sequence[int]]) -> None:
    """Replaces the model's layers by those in `layer_map`, each `[first, last)`, in that order.

    Raises `ConfigError`.
    """
    owner, attribute = _find(model)
    layers = getattr(owner, attribute)
    wrong = [list(pair) for pair in layer_map if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= len(layers)]
    if wrong or not layer_map:
        raise ConfigError(
            f"`layer_replication`: {wrong or list(layer_map)} are not ranges within the model's {len(layers)}"
            " layers"
        )
    copies = nn.ModuleList(
        _sharing(layers[index]) for first, last in layer_map for index in range(first, last)
    )
    for index, layer in enumerate(copies):
        parts: list[Any] = [module for module in layer.modules() if hasattr(module, "layer_idx")]
        for part in parts:
            part.layer_idx = index
    setattr(owner, attribute, copies)
    _tell(owner, len(copies))


def _find(model: nn.Module) -> tuple[nn.Module, str]:
    inner: Any = model
    while isinstance(getattr(inner, "model", None), nn.Module):
        inner = inner.model
    for name in ("bert", "transformer"):
        inner = inner._modules.get(name, inner)
    for path in LISTS:
        parent, _, attribute = path.rpartition(".")
        try:
            owner = inner.get_submodule(parent)
        except AttributeError:
            continue
        if isinstance(owner._modules.get(attribute), nn.ModuleList):
            return owner, attribute
    raise ConfigError(
        f"`layer_replication` works on models like Llama, BERT and Falcon, not on {type(model).__name__}"
    )


def _sharing(layer: nn.Module) -> nn.Module:
    """A copy of a layer that holds the same parameters and buffers."""
    held = [*layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in held})


def _tell(owner: nn.Module, count: int) -> None:
    settings: Any = getattr(owner, "config", None)
    if hasattr(settings, "num_hidden_layers"):
        settings.num_hidden_layers = count
