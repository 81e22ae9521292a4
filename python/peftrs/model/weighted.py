"""New adapters out of weighted sums of others."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.config import PeftConfig, PeftType
from peftrs.core.layer import AdaptedLayer
from peftrs.core.manage import check_known, set_requires_grad
from peftrs.core.replace import ReplacedModule
from peftrs.core.slots import FittedAdapter
from peftrs.core.tree import places, wrappers
from peftrs.errors import AdapterError, listed
from peftrs.methods import combine
from peftrs.model.attach import attach, peft_configs, whole_or_not
from peftrs.model.prepare import exactly

LOW_RANK = ("cat", "linear", "svd")
LATER = (
    "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What goes into the new adapter: sources with their weights, and how they are put together."""

    sources: dict[str, float]
    kind: str = "svd"
    rank: int | None = None
    clamp: float | None = None
    driver: str | None = None


def add_weighted(model: nn.Module, name: str, adapters: Sequence[str], weights: Sequence[float], **options: Any) -> None:
    """Adds the adapter `name`, frozen and not active, whose change is the weighted sum of the others'.

    Raises `AdapterError` for unknown or unfit sources, with nothing changed.
    """
    configs = peft_configs(model)
    if len(adapters) != len(weights) or not adapters or len(set(adapters)) != len(adapters):
        raise AdapterError(f"{len(adapters)} adapters and {len(weights)} weights were given: give one weight an adapter, each once")
    check_known(model, adapters)
    recipe = Recipe(dict(zip(adapters, map(float, weights), strict=True)), **options)
    kinds = {configs[each].peft_type for each in adapters}
    if kinds == {PeftType.LORA}:
        _check_low_rank(model, recipe, configs)
        _add_low_rank(model, name, recipe, configs)
    elif kinds == {PeftType.IA3}:
        _add_scaling(model, name, recipe, configs)
    else:
        raise AdapterError(
            f"adapters of the kinds {listed(sorted(map(str, kinds)))} have no weighted sum: LoRA and IA3 have one each"
        )


def _check_low_rank(model: nn.Module, recipe: Recipe, configs: dict[str, PeftConfig]) -> None:
    if recipe.kind in LATER:
        raise AdapterError(f"combination_type={recipe.kind!r} is not built yet in peftrs; it has {listed(list(LOW_RANK))}")
    if recipe.kind not in LOW_RANK:
        raise AdapterError(f"Invalid combination_type: {recipe.kind}; use one of {listed(list(LOW_RANK))}")
    if recipe.rank is not None and recipe.rank < 1:
        raise AdapterError(f"`svd_rank` is {recipe.rank} and must be positive")
    for field in ("target_parameters", "use_dora", "trainable_token_indices"):
        if holders := [each for each in recipe.sources if getattr(configs[each], field, None)]:
            raise AdapterError(f"`{field}` of {listed(holders)} has no weighted sum: what it trains is not a sum of changes")
    for path, wrapper in wrappers(model):
        if isinstance(wrapper, ReplacedModule):
            held = [each for each in recipe.sources if each in wrapper.modules_to_save]
            if len(held) > 1:
                raise AdapterError(f"{path}: {listed(held)} each replace this module, and whole modules are not added up")
        elif wrapper.spec.groups > 1 and any(each in wrapper.adapters for each in recipe.sources):
            raise AdapterError(f"{path}: a LoRA over {wrapper.spec.groups} groups of channels has no weighted sum of low rank")


def _add_low_rank(model: nn.Module, name: str, recipe: Recipe, configs: dict[str, PeftConfig]) -> None:
    held = _held(model, recipe)
    with torch.no_grad():
        terms = {layer: [_term(fitted, recipe.sources[fitted.name]) for fitted in found] for layer, found in held.items()}
        widest = max(sum(up.shape[1] for up, _ in each) for each in terms.values())
        largest = max(up.shape[1] for each in terms.values() for up, _ in each)
        rank = widest if recipe.kind != "svd" else recipe.rank or largest
        config = cast(Any, _config(configs, recipe, held, [place.name for place in places(model)]))
        config.r = config.lora_alpha = rank
        config.rank_pattern, config.alpha_pattern = {}, {}
        config.use_rslora, config.init_lora_weights = False, True
        config.lora_bias = any(getattr(configs[each], "lora_bias", False) for each in recipe.sources)
        with whole_or_not(model):
            attach(model, config, name)
            for layer, found in held.items():
                if recipe.kind == "svd":
                    summed = combine.truncated(terms[layer], rank, recipe.clamp, recipe.driver)
                else:
                    summed = combine.padded(combine.stacked(terms[layer]), rank)
                _fill(layer.adapters[name], summed, found, recipe)
            _finish(model, name, recipe)


def _held(model: nn.Module, recipe: Recipe) -> dict[AdaptedLayer, list[FittedAdapter]]:
    """The sources on every layer that has any, in the order given; not those that share another layer's tensors."""
    layers = [wrapper for _, wrapper in wrappers(model) if isinstance(wrapper, AdaptedLayer)]
    held = {layer: [layer.adapters[each] for each in recipe.sources if each in layer.adapters] for layer in layers}
    return {layer: found for layer, found in held.items() if found and found[0].leader is None}


def _term(fitted: FittedAdapter, weight: float) -> combine.Term:
    factors = cast(Any, fitted.method).factors(fitted)
    return factors[0] * (weight * fitted.scaling), factors[1]


def _config(
    configs: dict[str, PeftConfig], recipe: Recipe, held: dict[AdaptedLayer, list[FittedAdapter]], modules: list[str]
) -> PeftConfig:
    """The first source's config, for exactly the layers that any source has."""
    config = cast(Any, copy.deepcopy(configs[next(iter(recipe.sources))]))
    config.target_modules = exactly({layer.spec.name for layer in held}, modules)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    named = [each for source in recipe.sources for each in getattr(configs[source], "modules_to_save", None) or ()]
    config.modules_to_save = list(dict.fromkeys(named)) or None
    return cast(PeftConfig, config)


def _fill(fitted: FittedAdapter, term: combine.Term, sources: list[FittedAdapter], recipe: Recipe) -> None:
    up, down = term
    names = [slot for slot in fitted.slots if not slot.endswith(".bias")]
    for slot, value in zip(names, (down, up / fitted.scaling), strict=True):
        fitted[slot].copy_(value.reshape(fitted[slot].shape))
    if "lora_B.bias" in fitted:
        biases = [recipe.sources[each.name] * each.scaling * each["lora_B.bias"] for each in sources if "lora_B.bias" in each]
        fitted["lora_B.bias"].copy_(
            torch.stack(biases).sum(0) / fitted.scaling if biases else torch.zeros_like(fitted["lora_B.bias"])
        )


def _add_scaling(model: nn.Module, name: str, recipe: Recipe, configs: dict[str, PeftConfig]) -> None:
    held = _held(model, recipe)
    uneven = [layer.spec.name for layer, found in held.items() if len(found) < len(recipe.sources)]
    if uneven:
        raise AdapterError(f"not all of {listed(list(recipe.sources))} are on the same layers: {listed(uneven, 4)}")
    with torch.no_grad(), whole_or_not(model):
        first = cast(Any, configs[next(iter(recipe.sources))])
        config = copy.deepcopy(first)
        attach(model, config, name)
        for layer, found in held.items():
            fitted = layer.adapters[name]
            for slot in fitted.slots:
                values: list[Tensor] = [recipe.sources[each.name] * each[slot] for each in found]
                fitted[slot].copy_(torch.stack(values).sum(0))
        _finish(model, name, recipe)


def _finish(model: nn.Module, name: str, recipe: Recipe) -> None:
    for _, wrapper in wrappers(model):
        if isinstance(wrapper, ReplacedModule) and name in wrapper.modules_to_save:
            source = next((each for each in recipe.sources if each in wrapper.modules_to_save), None)
            if source is not None:
                wrapper.modules_to_save[name].load_state_dict(wrapper.modules_to_save[source].state_dict())
    set_requires_grad(model, name, False)
