"""A new LoRA adapter from changes of layers that are known already: what its config says, and what its
tensors are.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs import _native
from peftrs.bases.kinds import LayerKind, LayerSpec
from peftrs.config import PeftConfig
from peftrs.convert.combine import Factors, padded
from peftrs.core.manage import set_requires_grad
from peftrs.core.replace import ReplacedModule
from peftrs.core.slots import FittedAdapter
from peftrs.core.tree import adapted_layers, places, wrappers
from peftrs.errors import AdapterError, TargetError, listed
from peftrs.io.entries import device_of
from peftrs.methods.lora import Lora, LoraConfig
from peftrs.planning.attach import attach, whole_or_not
from peftrs.planning.settle import exactly

KEPT = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "modules_to_save",
    "inference_mode",
)
"""What a config of any kind hands on to the LoRA made of it."""


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one layer, scaling included: factors of the weight's change, and the bias's
    `(out,)` if any.
    """

    spec: LayerSpec
    term: Factors
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.term[0].shape[-1])


def config_like(config: PeftConfig) -> LoraConfig:
    """A LoRA's config for the same base and task: a copy of the given one where it is a LoRA's already."""
    if isinstance(config, LoraConfig):
        return copy.deepcopy(config)
    return LoraConfig(**{name: copy.copy(getattr(config, name)) for name in KEPT})


def settle(
    config: LoraConfig, ranks: Mapping[str, int], parameters: Sequence[str], modules: Sequence[str]
) -> None:
    """Makes the config say that exactly these layers (some of them bare parameters) have these ranks, and
    scaling 1.

    `modules` are the names of all modules of the model. The most usual rank is `r`; the others are in the
    patterns.
    """
    config.target_modules = exactly(set(ranks).difference(parameters), modules)
    config.target_parameters = sorted(parameters) or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    counts = Counter(ranks.values())
    config.r = max(counts, key=lambda rank: (counts[rank], rank))
    config.rank_pattern = {}
    for rank in sorted(set(counts) - {config.r}):
        config.rank_pattern |= dict.fromkeys(_keys(ranks, rank), rank)
    config.lora_alpha, config.alpha_pattern = config.r, dict(config.rank_pattern)
    config.use_rslora, config.use_dora, config.init_lora_weights = False, False, True
    config.use_qalora, config.loftq_config = False, {}


def _keys(ranks: Mapping[str, int], rank: int) -> list[str]:
    """Patterns that match the layers of this rank and no others."""
    names = [name for name in ranks if ranks[name] == rank]
    try:
        ends = _native.shortest_suffixes(names, [name for name in ranks if ranks[name] != rank])
    except TargetError:
        return [f"^{re.escape(name)}" for name in names]
    return [re.escape(end) for end in ends]


def add(
    model: nn.Module, name: str, config: LoraConfig, changes: Sequence[Change], sources: Sequence[str] = ()
) -> None:
    """Puts a new adapter, frozen, into the model that changes these layers so; `config` says all but which
    they are.

    Modules that it replaces are copies of those of the `sources`. Raises `AdapterError`, `ConfigError` or
    `TargetError`, with the model left as it was.
    """
    modules = [place.name for place in places(model)]
    config.lora_bias = any(change.bias is not None for change in changes)
    bare = [change.spec.name for change in changes if change.spec.kind is LayerKind.PARAMETER]
    settle(config, _ranks(changes), bare, modules)
    with torch.no_grad(), whole_or_not(model):
        attach(model, config, name, low_cpu_mem_usage=True)
        held = [layer.adapters[name] for layer in adapted_layers(model) if name in layer.adapters]
        fitted = {one.spec.name: one for one in held if not one.shares}
        if extra := sorted(fitted.keys() - {change.spec.name for change in changes}):
            raise AdapterError(
                f"no config of a LoRA has these layers alone: {listed(extra, 4)} would be targets too"
            )
        for change in changes:
            fill(fitted[change.spec.name], change)
        finish(model, name, sources)


def finish(model: nn.Module, name: str, sources: Sequence[str]) -> None:
    """Freezes a new adapter, and gives the modules that it replaces the values of the sources'."""
    for _, wrapper in wrappers(model):
        if isinstance(wrapper, ReplacedModule) and name in wrapper.modules_to_save:
            source = next((each for each in sources if each in wrapper.modules_to_save), None)
            if source is not None:
                wrapper.modules_to_save[name].load_state_dict(wrapper.modules_to_save[source].state_dict())
    set_requires_grad(model, name, False)


def _ranks(changes: Sequence[Change]) -> dict[str, int]:
    """The rank of each layer by name.

    An attention, which stands for its output projection too, has the larger one of both.
    """
    ranks = {change.spec.name: change.rank for change in changes}
    for change in changes:
        if change.spec.kind is LayerKind.ATTENTION:
            name = change.spec.name
            ranks[name] = max(ranks[name], ranks.pop(f"{name}.out_proj", 0))
    return ranks


def fill(fitted: FittedAdapter, change: Change) -> None:
    """Gives an adapter of one layer, whose slots may still wait for values, those that make this change."""
    up, down = padded(change.term, fitted.values["r"])
    values: dict[str, Tensor] = cast(Lora, fitted.method).arranged(fitted, up / fitted.scaling, down)
    if "lora_B.bias" in fitted:
        bias = up.new_zeros(fitted.spec.out_features) if change.bias is None else change.bias / fitted.scaling
        values["lora_B.bias"] = bias
    device = device_of(fitted.frozen)
    for slot, value in values.items():
        held: Any = fitted[slot]
        fitted[slot] = nn.Parameter(
            value.to(device, held.dtype).contiguous(), requires_grad=held.requires_grad
        )
