"""Layers that share one weight, and what follows for adapters: a change to one is a change to the other,
where that is wanted.
"""

from __future__ import annotations

from torch import nn

from peftrs import registry
from peftrs.bases import dense
from peftrs.bases.base import Base
from peftrs.bases.kinds import LayerKind
from peftrs.config import TargetedConfig
from peftrs.core.target import Target, aim
from peftrs.core.tree import Place, original
from peftrs.errors import listed


def tied(found: list[Place], place: Place) -> list[Place]:
    """The other linear layers and embeddings whose weight is this place's very parameter."""
    weight = original(place.module).weight
    kinds = (nn.Linear, nn.Embedding)
    return [
        p
        for p in found
        if p is not place and isinstance(inner := original(p.module), kinds) and inner.weight is weight
    ]


def token_rows(
    found: list[Place], config: TargetedConfig, input_embeddings: str | None, faults: list[str]
) -> list[Target]:
    """Targets for `trainable_token_indices`: the embeddings and output layers named, and what is tied to
    them.

    What is tied shares its tensors, unless it is named with tokens of its own.
    """
    indices = config.trainable_token_indices
    if not indices:
        return []
    if not isinstance(indices, dict):
        if input_embeddings is None:
            faults.append(
                "`trainable_token_indices`: the model does not say which layer embeds its inputs; use {name:"
                " indices}"
            )
            return []
        indices = {input_embeddings: indices}
    wanted: dict[str, tuple[Place, list[int]]] = {}
    for name, tokens in indices.items():
        places = [place for place in found if place.name == name or place.name.endswith(f".{name}")]
        if not places:
            faults.append(f"`trainable_token_indices`: the model has no layer {name!r}")
        for place in places:
            inner = original(place.module)
            if isinstance(inner, nn.Embedding | nn.Linear):
                wanted[place.name] = place, list(tokens)
            else:
                faults.append(
                    f"`trainable_token_indices`: {place.name} is a {type(inner).__name__}, neither embedding"
                    " nor linear"
                )
    method, targets = registry.method("TOKEN_ROWS"), dict[str, Target]()
    # Embeddings lead, whichever was named first.
    for place, tokens in sorted(wanted.values(), key=lambda one: _base(one[0]) is not dense.EMBEDDING):
        if place.name in targets:
            continue
        matched = {"trainable_token_indices": tokens}
        targets[place.name] = aim(place, _base(place), method, matched)
        for other in tied(found, place):
            own = wanted.get(other.name, (other, tokens))[1]
            if own == tokens:
                targets[other.name] = aim(other, _base(other), method, matched, tied=place.name)
            elif config.ensure_weight_tying:
                faults.append(
                    f"`trainable_token_indices`: {place.name} and {other.name} are tied"
                    f" (`ensure_weight_tying`) and cannot have rows of their own, {tokens[:8]} and {own[:8]}"
                )
    return list(targets.values())


def _base(place: Place) -> Base:
    return dense.EMBEDDING if isinstance(original(place.module), nn.Embedding) else dense.LINEAR


def followers(found: list[Place], config: TargetedConfig, targets: list[Target]) -> list[Target]:
    """With `ensure_weight_tying`, targets for the layers tied to embeddings that are targets, sharing their
    tensors.

    They stand in place of targets for the same layers that would have tensors of their own.
    """
    if not config.ensure_weight_tying:
        return []
    extra: dict[str, Target] = {}
    for target in targets:
        spec, method = target.spec, target.method
        if spec.kind is LayerKind.EMBEDDING and method.public and spec.name not in extra:
            for place in tied(found, target.place):
                follower = aim(place, _base(place), method, dict(spec.matched), tied=spec.name)
                if follower.spec.kind is LayerKind.LINEAR or shares(follower, config):
                    extra[place.name] = follower
    return list(extra.values())


def shares(target: Target, config: TargetedConfig) -> bool:
    """Whether an adapter can do with the tensors of the layer that this one is tied to."""
    values = target.values or target.method.settle(config, target.spec)
    return all(slot.of is not None for slot in target.method.kinds(config, target.spec, values).values())


def saved(found: list[Place], config: TargetedConfig, names: list[str]) -> list[tuple[Place, str | None]]:
    """The modules to train whole, each with the name of the one whose weight its copy shares."""
    chosen: list[tuple[Place, str | None]] = [(place, None) for place in found if place.name in set(names)]
    if not config.ensure_weight_tying:
        return chosen
    bound: dict[str, tuple[Place, str | None]] = {}
    for place, _ in chosen:
        bound.setdefault(place.name, (place, None))
        if isinstance(original(place.module), nn.Linear | nn.Embedding):
            for other in tied(found, place):
                bound.setdefault(other.name, (other, place.name))
    return list(bound.values())


def notes(
    found: list[Place],
    config: TargetedConfig,
    targets: list[Target],
    saved: list[tuple[Place, str | None]],
) -> list[str]:
    """What to warn of: modules trained whole that part from what they are tied to, and a wish to keep ties
    where there are none.
    """
    ensured = config.ensure_weight_tying
    if ensured is None or type(config).ensure_weight_tying:
        return []  # a kind that never keeps ties, or always: nobody asked for either
    tables = {
        id(inner.weight) for place in found if isinstance(inner := original(place.module), nn.Embedding)
    }
    whole = [place for place, _ in saved if id(getattr(original(place.module), "weight", None)) in tables]
    if ensured:
        kept = any(tied(found, place) for place in whole) or any(
            tied(found, one.place)
            for one in targets
            if id(getattr(original(one.place.module), "weight", None)) in tables
        )
        return (
            []
            if kept
            else ["`ensure_weight_tying` has no effect: nothing that the adapter changes shares its weight"]
        )
    names = {place.name for place in whole}
    parted = {
        place.name: [other.name for other in tied(found, place) if other.name not in names] for place in whole
    }
    return [
        f"{name} is trained whole, and parts from {listed(others)}, which it is tied to and which stays as it"
        " is; hint: ensure_weight_tying=True changes both alike"
        for name, others in parted.items()
        if others
    ]
