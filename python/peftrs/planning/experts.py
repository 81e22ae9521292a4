"""Configs that name the layers of experts one by one, for models that hold all experts in one parameter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from peftrs import _native
from peftrs.bases import dense
from peftrs.bases.experts import Holder, experts_of, holders
from peftrs.config import NO_FIELD
from peftrs.core.select import ALL_LINEAR
from peftrs.core.tree import Place, original
from peftrs.errors import ConfigError


def converted(config: Any, targets: Any, model: nn.Module, found: list[Place]) -> dict[str, Any]:
    """The fields of a LoRA's config that mean on this model what they meant when experts were layers; empty
    if that is the same.

    `targets` are the config's, or the defaults for the model. Ranks of layers that became one add up, and its
    alpha keeps their scaling. Raises `ConfigError` where only some of the layers, or of the experts, that
    became one parameter are targets.
    """
    if config.target_parameters is NO_FIELD or not targets:
        return {}
    experts = experts_of(model)
    modules = {place.name: original(place.module) for place in found} if experts.fusions else {}
    held = holders(experts, modules)
    if not held:
        return {}
    chosen, ranks, spent = _chosen(config, targets, held)
    routers = _routers(config, targets, held, modules)
    if not chosen and not routers:
        return {}
    parameters = {holder.parameter: _fitted(config, holder, ranks) for holder in held if holder in chosen}
    # Names that stand for nothing else go; a pattern goes where nothing is left for it.
    supported = [name for name, module in modules.items() if dense.resolve(module) is not None]
    kept: Any = targets
    if not isinstance(targets, str):
        kept = {one for one in targets if _native.select(supported, target_modules=[one]).targets}
    elif targets.lower() != ALL_LINEAR and not _native.select(supported, target_modules=targets).targets:
        kept = set()
    if kept:
        selection = _selected(config, kept, supported, supported)
        for field, keys in spent.items():
            keys -= {list(getattr(config, field))[at] for at in selection.pattern_index(field) if at >= 0}
    stated = _stated(config, parameters, [holder for holder in held if holder not in chosen], spent)
    wanted = {
        *(config.target_parameters or ()),
        *stated.pop("target_parameters"),
        *(f"{name}.weight" for name in routers),
    }
    return {**stated, "target_modules": kept, "target_parameters": sorted(wanted)}


def _selected(config: Any, targets: Any, names: list[str], linear: Iterable[str]) -> _native.Selection:
    layers, pattern = config.layers_to_transform, config.layers_pattern
    return _native.select(
        names,
        target_modules=targets if isinstance(targets, str) else sorted(targets),
        exclude_modules=(
            config.exclude_modules
            if isinstance(config.exclude_modules, str)
            else sorted(config.exclude_modules or ())
        ),
        linear=list(linear),
        layers_to_transform=[layers] if isinstance(layers, int) else layers,
        layers_pattern=[pattern] if isinstance(pattern, str) else pattern,
        patterns={name: list(getattr(config, name) or {}) for name in PATTERNS},
    )


PATTERNS = ("rank_pattern", "alpha_pattern")
Ranks = dict[tuple[str, str], tuple[int, float]]


def _chosen(config: Any, targets: Any, held: list[Holder]) -> tuple[set[Holder], Ranks, dict[str, set[str]]]:
    """The holders whose layers are all targets, the rank and alpha of each layer, and the patterns' keys that
    gave them.
    """
    names = {
        f"{holder.name}.{at}.{layer}": (holder, layer)
        for holder in held
        for layer in holder.fusion.layers
        for at in {0, holder.experts - 1}
    }
    selection = _selected(config, targets, list(names), names)
    ranks: Ranks = {}
    counts: dict[Holder, int] = {}
    patterns = [selection.pattern_index(field) for field in PATTERNS]
    spent = {
        field: {list(getattr(config, field))[at] for at in indices if at >= 0}
        for field, indices in zip(PATTERNS, patterns, strict=True)
    }
    for at, name in enumerate(selection.targets):
        holder, layer = names[name]
        counts[holder] = counts.get(holder, 0) + 1
        rank, alpha = (
            own if indices[at] < 0 else list(getattr(config, field).values())[indices[at]]
            for field, own, indices in zip(PATTERNS, (config.r, config.lora_alpha), patterns, strict=True)
        )
        ranks[holder.name, layer] = rank, alpha
    for holder, count in counts.items():
        if count < len(holder.fusion.layers) * len({0, holder.experts - 1}):
            targeted = sorted({layer for name, layer in ranks if name == holder.name})
            raise ConfigError(
                f"`target_modules`: {', '.join(targeted)} of {holder.name} cannot be adapted alone:"
                f" {', '.join(holder.fusion.layers)} of all experts are the one parameter"
                f" {holder.fusion.parameter!r} here; name all of them, or the parameter"
            )
    return set(counts), ranks, spent


def _fitted(config: Any, holder: Holder, ranks: Ranks) -> tuple[int, float]:
    """The rank and alpha of the parameter."""
    parts = [ranks[holder.name, layer] for layer in holder.fusion.layers]
    scalings = {alpha / (math.sqrt(rank) if config.use_rslora else rank) for rank, alpha in parts}
    if len(scalings) > 1:
        raise ConfigError(
            f"{holder.parameter}: its layers have different scalings by the config, and it can only have one"
        )
    rank = sum(rank for rank, _ in parts)
    alpha = parts[0][1] * rank / parts[0][0] if not config.use_rslora else scalings.pop() * math.sqrt(rank)
    return rank, int(alpha) if alpha == int(alpha) else alpha


def _stated(
    config: Any, parameters: dict[str, tuple[int, float]], others: list[Holder], spent: dict[str, set[str]]
) -> dict[str, Any]:
    """`target_parameters`, `rank_pattern` and `alpha_pattern`: one entry for all layers of the model where
    those are alike.

    The keys that were `spent` on layers which are no more go.
    """
    wanted: list[str] = []
    ranks, alphas = (
        {key: value for key, value in (getattr(config, field) or {}).items() if key not in spent[field]}
        for field in PATTERNS
    )
    by_leaf: dict[str, set[tuple[int, float]]] = {}
    for name, values in parameters.items():
        by_leaf.setdefault(name.rpartition(".")[2], set()).add(values)
    left_out = {holder.fusion.parameter for holder in others}
    for leaf, found in by_leaf.items():
        alike = len(found) == 1 and leaf not in left_out
        names = [leaf] if alike else [name for name in parameters if name.endswith(f".{leaf}")]
        wanted += names
        for name in names:
            rank, alpha = next(iter(found)) if alike else parameters[name]
            key = rf".*\.{re.escape(leaf)}" if alike else f"^{re.escape(name)}$"
            if rank != config.r:
                ranks[key] = rank
            if alpha != config.lora_alpha:
                alphas[key] = alpha
    return {"target_parameters": wanted, "rank_pattern": ranks, "alpha_pattern": alphas}


def _routers(config: Any, targets: Any, held: list[Holder], modules: dict[str, nn.Module]) -> set[str]:
    """The last parts of the names of routers that are targets: linear layers once, modules with a weight of
    their own now.
    """
    beside = {holder.name.rpartition(".")[0] for holder in held}
    found = [
        name
        for name, module in modules.items()
        if name.rpartition(".")[0] in beside
        and dense.resolve(module) is None
        and _is_matrix(module._parameters.get("weight"))
    ]
    return (
        {name.rpartition(".")[2] for name in _selected(config, targets, found, found).targets}
        if found
        else set()
    )


def _is_matrix(weight: Any) -> bool:
    return weight is not None and weight.ndim == 2
