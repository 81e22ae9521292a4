"""New adapters out of several others: weighted sums of what they change, exact or of a smaller rank, and
PEFT's other mixtures.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases.kinds import Term
from peftrs.config import PeftConfig, PeftType
from peftrs.convert import changes as low_rank
from peftrs.convert import combine, task_vectors
from peftrs.convert.changes import Change
from peftrs.convert.habits import mixes_linear
from peftrs.core.inject import activation, check_name
from peftrs.core.layer import AdaptedLayer
from peftrs.core.manage import check_known
from peftrs.core.replace import ReplacedModule
from peftrs.core.slots import FittedAdapter
from peftrs.core.tree import wrappers
from peftrs.errors import AdapterError, PeftrsWarning, joined, listed
from peftrs.planning.attach import attach, peft_configs, whole_or_not

Merge = Callable[[Sequence[Tensor], Tensor], Tensor]
"""One tensor out of several and their weights."""

SUMS = ("exact", "cat", "linear", "svd")
PRUNED = {"magnitude_prune": task_vectors.magnitude_prune, "dare_linear": task_vectors.dare_linear}
ELECTED = {"ties": task_vectors.ties, "dare_ties": task_vectors.dare_ties}
KINDS = (*SUMS, *(f"{name}{form}" for name in {**PRUNED, **ELECTED} for form in ("", "_svd")))
"""Every `combination_type`.

Without `_svd` the pruning kinds act on the factors one by one, with it on the changes themselves.
"""

_told: set[str] = set()
"""What was said once already."""


@dataclass(frozen=True)
class Recipe:
    """What goes into the new adapter: sources with their weights, and how they are put together."""

    sources: dict[str, float]
    kind: str = "svd"
    rank: int | None = None
    clamp: float | None = None
    driver: str | None = None
    density: float | None = None
    sign: str = "total"

    @property
    def dense(self) -> bool:
        """Whether the changes themselves are merged by what is no sum."""
        return self.kind.endswith("_svd")

    @property
    def merge(self) -> Merge:
        """How tensors become one."""
        kind = self.kind.removesuffix("_svd")
        if kind in PRUNED:
            return partial(PRUNED[kind], density=cast(float, self.density))
        if kind in ELECTED:
            sign = cast(task_vectors.Sign, self.sign)
            return partial(ELECTED[kind], density=cast(float, self.density), majority_sign_method=sign)
        return task_vectors.task_arithmetic


def add_weighted(
    model: nn.Module, name: str, adapters: Sequence[str], weights: Sequence[float], **options: Any
) -> None:
    """Adds the adapter `name`, frozen and not active, made of the others as `options` (the fields of
    `Recipe`) say.

    Raises `AdapterError` for unknown or unfit sources, with nothing changed.
    """
    configs = peft_configs(model)
    if len(adapters) != len(weights) or not adapters or len(set(adapters)) != len(adapters):
        raise AdapterError(
            f"{len(adapters)} adapters and {len(weights)} weights were given: give one weight an adapter,"
            " each once"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise AdapterError(f"the weights {list(weights)} are not all finite numbers")
    check_known(model, adapters)
    check_name(activation(model), name)
    recipe = Recipe(dict(zip(adapters, map(float, weights), strict=True)), **options)
    kinds = {configs[each].peft_type for each in adapters}
    if kinds == {PeftType.LORA}:
        _add_low_rank(model, name, recipe, configs)
    elif kinds == {PeftType.IA3}:
        _add_scaling(model, name, recipe, configs)
    else:
        raise AdapterError(
            f"adapters of the kinds {listed(sorted(map(str, kinds)))} have no weighted sum: LoRA and IA3 have"
            " one each; hint: peftrs.convert_to_lora makes a LoRA of any adapter"
        )


def _add_low_rank(model: nn.Module, name: str, recipe: Recipe, configs: dict[str, PeftConfig]) -> None:
    mixes = _check_recipe(recipe)
    held = _held(model, recipe)
    _check_sources(model, held, recipe, configs, factors=mixes)
    with torch.no_grad():
        rank = recipe.rank or max(
            _factors(fitted)[0].shape[-1] for found in held.values() for fitted in found
        )
        if mixes:
            changes = [_mixed(found, recipe) for found in held.values()]
        elif recipe.dense:
            changes = [_merged(found, recipe, rank) for found in held.values()]
        else:
            changes = [_summed(found, recipe, rank) for found in held.values()]
        config = low_rank.config_like(configs[next(iter(recipe.sources))])
        others = [configs[each] for each in recipe.sources]
        named = [each for other in others for each in other.modules_to_save or ()]
        config.modules_to_save = list(dict.fromkeys(named)) or None
        config.ensure_weight_tying = any(other.ensure_weight_tying for other in others)
        low_rank.add(model, name, config, changes, list(recipe.sources))


def _check_recipe(recipe: Recipe) -> bool:
    """Raises `AdapterError` for what no source could be combined by; returns whether factors are merged one
    by one.
    """
    pruning = recipe.kind not in SUMS
    if recipe.kind not in KINDS:
        raise AdapterError(
            f"Invalid combination_type: {recipe.kind}; use one of {listed(list(KINDS), len(KINDS))}"
        )
    faults = []
    if recipe.rank is not None and recipe.rank < 1:
        faults.append(f"`svd_rank` is {recipe.rank} and must be positive")
    if recipe.clamp is not None and not 0 <= recipe.clamp <= 1:
        faults.append(f"`svd_clamp` is {recipe.clamp} and must be a quantile, from 0 to 1")
    if pruning and (recipe.density is None or not 0 < recipe.density <= 1):
        faults.append(
            f"combination_type={recipe.kind!r} needs a `density` above 0 and up to 1, not {recipe.density}"
        )
    if recipe.sign not in ("total", "frequency"):
        faults.append(f"`majority_sign_method` is {recipe.sign!r} and must be 'total' or 'frequency'")
    if faults:
        raise AdapterError("; ".join(faults))
    if recipe.kind != "linear" or not mixes_linear():
        return pruning and not recipe.dense
    if "linear" not in _told and len(recipe.sources) > 1:
        _told.add("linear")
        warnings.warn(
            "combination_type='linear' adds up factors, as PEFT does, and their product is not the weighted"
            " sum of the adapters; hint: 'exact' is that sum, and 'svd' the best one of a small rank",
            PeftrsWarning,
            stacklevel=5,
        )
    return True


def _held(model: nn.Module, recipe: Recipe) -> dict[AdaptedLayer, list[FittedAdapter]]:
    """The sources on every layer that has any, in the order given; not those that share another layer's
    tensors.
    """
    layers = [wrapper for _, wrapper in wrappers(model) if isinstance(wrapper, AdaptedLayer)]
    held = {
        layer: [layer.adapters[each] for each in recipe.sources if each in layer.adapters] for layer in layers
    }
    return {layer: found for layer, found in held.items() if not all(fitted.shares for fitted in found)}


def _check_sources(
    model: nn.Module,
    held: dict[AdaptedLayer, list[FittedAdapter]],
    recipe: Recipe,
    configs: dict[str, PeftConfig],
    *,
    factors: bool,
) -> None:
    for field in ("use_dora", "trainable_token_indices"):
        if holders := [each for each in recipe.sources if getattr(configs[each], field)]:
            raise AdapterError(
                f"`{field}` of {listed(holders)} has no weighted sum: what it trains is not a sum of changes"
            )
    if not held:
        raise AdapterError(f"{listed(list(recipe.sources))} change no layer: there is nothing to combine")
    faults = [
        f"{path}: {fault}"
        for path, wrapper in wrappers(model)
        if (fault := _fault(wrapper, held, recipe, factors))
    ]
    if faults:
        raise AdapterError(joined(faults, 4))


def _fault(
    wrapper: nn.Module, held: dict[AdaptedLayer, list[FittedAdapter]], recipe: Recipe, factors: bool
) -> str | None:
    """Why the sources cannot be combined on one layer or module, if so."""
    if isinstance(wrapper, ReplacedModule):
        replacing = [each for each in recipe.sources if each in wrapper.modules_to_save]
        return (
            f"{listed(replacing)} each replace this module, and whole modules are not added up"
            if len(replacing) > 1
            else None
        )
    found = held.get(cast(AdaptedLayer, wrapper))
    if found is None:
        return None
    names = listed([fitted.name for fitted in found])
    if any(fitted.shares for fitted in found):
        return f"of {names} some share the tensors of a tied layer here and some have their own"
    if found[0].spec.groups > 1:
        return f"a LoRA over {found[0].spec.groups} groups of channels has no weighted sum of low rank"
    if any(fitted.method.term(fitted) is None for fitted in found):
        return f"what {names} do is not added to the weight"
    if factors and any(not kind.saved for fitted in found for kind in fitted.kinds.values()):
        return (
            f"of {names} some start from the base weights: their factors mean nothing alone; hint: use a kind"
            " that ends in _svd"
        )
    if factors and len({fitted.values["r"] for fitted in found}) > 1:
        ranks = ", ".join(f"{fitted.name!r} has {fitted.values['r']}" for fitted in found)
        return (
            f"combination_type={recipe.kind!r} takes factors of equal rank, and {ranks}; hint: use 'exact',"
            " 'svd' or a kind that ends in _svd"
        )
    return None


def _factors(fitted: FittedAdapter) -> combine.Factors:
    up, down, *_ = cast(Term, fitted.method.term(fitted))
    wide = torch.promote_types(up.dtype, torch.float32)
    return up.to(wide), down.to(wide)


def _weights(found: Iterable[FittedAdapter], recipe: Recipe, like: Tensor, *, scaled: bool) -> Tensor:
    values = [recipe.sources[fitted.name] * (fitted.scaling if scaled else 1.0) for fitted in found]
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _summed(found: list[FittedAdapter], recipe: Recipe, rank: int) -> Change:
    """The sum of the changes: of the sum of their ranks, or of a smaller rank from the factors alone."""
    factors = [_factors(fitted) for fitted in found]
    weights = _weights(found, recipe, factors[0][0], scaled=True)
    term = combine.stacked([(up, down * weight) for (up, down), weight in zip(factors, weights, strict=True)])
    if recipe.kind == "svd":
        term = combine.truncated(term, rank, recipe.clamp, recipe.driver)
    elif recipe.kind != "cat":
        term = combine.truncated(term, term[0].shape[-1])
    return Change(found[0].spec, term, _bias(found, recipe))


def _mixed(found: list[FittedAdapter], recipe: Recipe) -> Change:
    """The factors merged one by one, each with the root of the weight, whose sign goes with `A`."""
    ups, downs = zip(*(_factors(fitted) for fitted in found), strict=True)
    weights = _weights(found, recipe, ups[0], scaled=True)
    roots = weights.abs().sqrt()
    down = recipe.merge(downs, torch.where(weights < 0, -roots, roots))
    return Change(found[0].spec, (recipe.merge(ups, roots), down), _bias(found, recipe))


def _merged(found: list[FittedAdapter], recipe: Recipe, rank: int) -> Change:
    """The changes merged as they are in the layer's own layout, then the best approximation of a small
    rank.
    """
    deltas, transposed = [], found[0].frozen.base.transposed
    for fitted in found:
        up, down = _factors(fitted)
        delta = (up @ down) * fitted.scaling
        deltas.append(delta.mT.contiguous() if transposed else delta)
    delta = recipe.merge(deltas, _weights(found, recipe, deltas[0], scaled=False))
    term = combine.scaled(combine.leading(delta.mT if transposed else delta, rank))
    return Change(found[0].spec, combine.clamped(term, recipe.clamp), _bias(found, recipe))


def _bias(found: list[FittedAdapter], recipe: Recipe) -> Tensor | None:
    """The changes of the bias, merged in the same way."""
    holders = [fitted for fitted in found if "lora_B.bias" in fitted]
    if not holders:
        return None
    biases = [fitted["lora_B.bias"] * fitted.scaling for fitted in holders]
    return recipe.merge(biases, _weights(holders, recipe, biases[0], scaled=False))


def _add_scaling(model: nn.Module, name: str, recipe: Recipe, configs: dict[str, PeftConfig]) -> None:
    held = _held(model, recipe)
    uneven = [layer.spec.name for layer, found in held.items() if len(found) < len(recipe.sources)]
    if uneven:
        raise AdapterError(
            f"not all of {listed(list(recipe.sources))} are on the same layers: {listed(uneven, 4)}"
        )
    with torch.no_grad(), whole_or_not(model):
        attach(model, copy.deepcopy(configs[next(iter(recipe.sources))]), name)
        for layer, found in held.items():
            fitted = layer.adapters[name]
            for slot, _ in fitted.parameters():
                values: list[Tensor] = [recipe.sources[each.name] * each[slot] for each in found]
                fitted[slot].copy_(torch.stack(values).sum(0))
        low_rank.finish(model, name, list(recipe.sources))
