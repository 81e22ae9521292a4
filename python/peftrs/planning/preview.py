"""What a config would do to a model, told before anything is done."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import cast

from torch import nn

from peftrs import registry
from peftrs.config import NO_TARGETS, PeftConfig, PromptLearningConfig, TargetedConfig
from peftrs.core.prompt import PromptMethod
from peftrs.core.target import Plan, Target
from peftrs.core.tree import users_model
from peftrs.errors import ConfigError, PeftrsWarning
from peftrs.planning.coverage import Coverage, coverage
from peftrs.planning.prompt_sizes import sizes
from peftrs.planning.settle import HEADS, changed, make_plan, uneven


@dataclass(frozen=True)
class EntryMatches:
    """One entry of a config's field, how many modules or parameters it matches, and the nearest name if it
    matches none.
    """

    field: str
    entry: str
    matches: int
    nearest: str | None


@dataclass(frozen=True)
class TargetPlan:
    """What an adapter would change; names are the model's own."""

    method: str
    targets: list[str]
    """The layers, and bare parameters, that are adapted."""
    modules_to_save: list[str]
    """The modules that are trained whole."""
    excluded: list[str]
    """What `exclude_modules` takes out."""
    entries: list[EntryMatches]
    coverage: list[Coverage]
    """Every list of layers that is adapted, and how many targets lie in each layer."""
    trainable_parameters: int
    """How many parameters the adapter trains, biases of the model apart."""
    warnings: list[str]
    """What injecting the adapter would warn of, or refuse for its strictness."""

    @property
    def unmatched(self) -> list[EntryMatches]:
        """The entries that match nothing."""
        return [entry for entry in self.entries if not entry.matches]

    def __str__(self) -> str:
        rows = [
            f"{self.method}: {len(self.targets)} layers, {self.trainable_parameters:,} parameters to train"
        ]
        for entry in self.entries:
            near = f" (the nearest name is {entry.nearest!r})" if entry.nearest and not entry.matches else ""
            rows.append(f"  {entry.field}: {entry.entry!r} matches {entry.matches}{near}")
        rows += [f"  {one}" for one in self.coverage]
        rows += [f"  trained whole: {name}" for name in self.modules_to_save]
        return "\n".join([*rows, *(f"  warning: {text}" for text in self.warnings)])


def plan(model: nn.Module, config: PeftConfig) -> TargetPlan:
    """What `get_peft_model` or `add_adapter` would do with the config, without touching the model or the
    config.

    Entries that match nothing are told, not refused. Raises what those raise for anything else: `TargetError`
    where nothing at all matches, `ConfigError` for layers that cannot be adapted as asked.
    """
    inner = users_model(model)
    if config.peft_type is None or not isinstance(config, TargetedConfig):
        raise ConfigError(
            f"{type(config).__name__} does not say what kind of adapter it is for: use one such as LoraConfig"
        )
    if config.layer_replication:
        raise ConfigError(
            "`layer_replication` changes the model's layers, which nothing can be planned on before it has"
        )
    method = registry.method(config.peft_type)
    heads = getattr(model, "heads", ()) or HEADS.get(str(config.task_type), ())
    planned = changed(config, {})
    planned.modules_to_save = [*(config.modules_to_save or ()), *heads] or None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PeftrsWarning)
        found, settled = make_plan(inner, planned, method, heads=heads, strict=False)
        if isinstance(method, PromptMethod):
            settled |= sizes(inner, cast(PromptLearningConfig, config))
    modules = [place.name for place in found.found]
    targets = [target.spec.name for target in found.targets]
    return TargetPlan(
        method=method.variant(config).name,
        targets=targets,
        modules_to_save=[place.name for place, _ in found.saved],
        excluded=list(found.selection.excluded),
        entries=[EntryMatches(*row) for row in found.selection.report if row[1] != NO_TARGETS],
        coverage=coverage(modules, targets),
        trainable_parameters=_count(found, changed(config, settled)),
        warnings=[str(one.message) for one in caught] + uneven(config, found),
    )


def _count(found: Plan, config: TargetedConfig) -> int:
    method = registry.method(cast(str, config.peft_type))
    whole = sum(
        one.numel() for place, tied in found.saved if tied is None for one in place.module.parameters()
    )
    if isinstance(method, PromptMethod):
        encoder = method.encoder(changed(config, {"inference_mode": False}))
        return whole + sum(one.numel() for one in encoder.trained())
    return whole + sum(_size(target, config) for target in found.targets)


def _size(target: Target, config: TargetedConfig) -> int:
    kinds = target.method.kinds(config, target.spec, target.values).values()
    return sum(math.prod(kind.shape) for kind in kinds if kind.trained and kind.of is None)
