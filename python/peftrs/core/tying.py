"""Layers that share one weight, and what follows for adapters: a change to one is a change to the other, where that is wanted."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftrs import registry
from peftrs.bases import dense
from peftrs.bases.kinds import LayerKind
from peftrs.core.target import Target, aim
from peftrs.core.tree import Place, original


def tied_linears(found: list[Place], weight: Any) -> list[Place]:
    """The linear layers whose weight is this very parameter."""
    return [p for p in found if isinstance(inner := original(p.module), nn.Linear) and inner.weight is weight]


def token_rows(found: list[Place], config: Any, input_embeddings: str | None, faults: list[str]) -> list[Target]:
    """Targets for `trainable_token_indices`: the embeddings named, and the output layers tied to them."""
    indices = getattr(config, "trainable_token_indices", None)
    if not indices:
        return []
    if not isinstance(indices, dict):
        if input_embeddings is None:
            faults.append("`trainable_token_indices`: the model does not say which layer embeds its inputs; use {name: indices}")
            return []
        indices = {input_embeddings: indices}
    method, targets = registry.method("TOKEN_ROWS"), []
    for name, tokens in indices.items():
        places = [place for place in found if place.name == name or place.name.endswith(f".{name}")]
        if not places:
            faults.append(f"`trainable_token_indices`: the model has no layer {name!r}")
        for place in places:
            inner = original(place.module)
            if not isinstance(inner, nn.Embedding):
                faults.append(f"`trainable_token_indices`: {place.name} is a {type(inner).__name__}, not an embedding")
                continue
            matched = {"trainable_token_indices": list(tokens)}
            targets.append(aim(place, dense.EMBEDDING, method, matched))
            targets += [aim(other, dense.LINEAR, method, matched, tied=place.name) for other in tied_linears(found, inner.weight)]
    return targets


def followers(found: list[Place], config: Any, targets: list[Target]) -> list[Target]:
    """With `ensure_weight_tying`, targets for the output layers tied to embeddings that are targets, sharing their tensors."""
    if not getattr(config, "ensure_weight_tying", False):
        return []
    extra = []
    for target in targets:
        if target.spec.kind is LayerKind.EMBEDDING and target.method.name != "TOKEN_ROWS":
            for place in tied_linears(found, original(target.place.module).weight):
                matched = dict(target.spec.matched)
                extra.append(aim(place, dense.LINEAR, target.method, matched, tied=target.spec.name))
    return extra


def saved(found: list[Place], config: Any, names: list[str]) -> list[tuple[Place, str | None]]:
    """The modules to train whole, each with the name of the one whose weight its copy shares."""
    chosen: list[tuple[Place, str | None]] = [(place, None) for place in found if place.name in set(names)]
    if getattr(config, "ensure_weight_tying", False):
        for place, _ in list(chosen):
            inner = original(place.module)
            if isinstance(inner, nn.Embedding):
                others = [other for other in tied_linears(found, inner.weight) if other.name not in names]
                chosen += [(other, place.name) for other in others]
    return chosen
