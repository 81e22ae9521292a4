"""From what a config says to what it means on one model: default targets, "all-linear", short lists,
orientation.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from peftrs import _native
from peftrs.bases import dense
from peftrs.config import NO_FIELD, PeftType, TargetedConfig, TaskType
from peftrs.core.method import Method
from peftrs.core.select import ALL_LINEAR
from peftrs.core.target import Plan
from peftrs.core.tree import Place, embedding_layers, original, places
from peftrs.errors import ConfigError, PeftrsWarning, Strict
from peftrs.planning import targets as planning
from peftrs.planning.coverage import coverage
from peftrs.planning.defaults import FEEDFORWARD, SKIPPED, SKIPPING, TARGETS
from peftrs.planning.experts import converted

CLASSIFIERS = ("score", "classifier")
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The names that configs of a task list for its head, whichever of them the model has."""
LONG_LIST = 20
"""From how many names on a list of targets is shortened to suffixes that mean the same."""


def model_type(model: nn.Module) -> str:
    """What transformers calls the architecture, or "custom"."""
    settings = getattr(model, "config", None)
    kind = settings.get("model_type") if isinstance(settings, dict) else getattr(settings, "model_type", None)
    return kind if isinstance(kind, str) else "custom"


def settle(model: nn.Module, config: TargetedConfig, method: Method) -> dict[str, Any]:
    """The config's fields that the model decides, by name; the config itself is left alone.

    Raises `ConfigError`.
    """
    settled: dict[str, Any] = {}
    kind = model_type(model)
    if config.target_modules is None:
        default = TARGETS.get(PeftType(method.name), {}).get(kind)
        if method.name == PeftType.TRAINABLE_TOKENS:
            default = ((input_embeddings(model, list(places(model))) or "embed_tokens").rpartition(".")[2],)
        if default is not None:
            settled["target_modules"] = default if isinstance(default, str) else set(default)
        elif not config.target_parameters:
            wanted = "`target_modules`"
            if config.target_parameters is not NO_FIELD:
                wanted += " or `target_parameters`"
            raise ConfigError(
                f"Please specify {wanted} in `peft_config`: there is no default for model type {kind!r}"
            )
    if config.feedforward_modules is None:
        if kind not in FEEDFORWARD:
            raise ConfigError(
                "Please specify `feedforward_modules` in `peft_config`: there is no default for model type"
                f" {kind!r}"
            )
        settled["feedforward_modules"] = set(FEEDFORWARD[kind])
    return settled


def exactly(names: set[str], modules: Iterable[str]) -> str | set[str]:
    """What `target_modules` says for these modules and no others: their names, or a pattern where one is the
    end of another's.
    """
    endings = tuple(f".{name}" for name in names)
    if any(module.endswith(endings) and module not in names for module in modules):
        return "|".join(re.escape(name) for name in sorted(names))
    return set(names)


def changed(config: TargetedConfig, values: dict[str, Any]) -> TargetedConfig:
    """A copy of the config with other values."""
    other = copy.copy(config)
    for name, value in values.items():
        setattr(other, name, value)
    return other


def make_plan(
    model: nn.Module,
    config: TargetedConfig,
    method: Method,
    *,
    heads: tuple[str, ...] = (),
    names: set[str] | None = None,
    strict: Strict = None,
    found: list[Place] | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """What the adapter changes, and the config's fields as they are to be kept; nothing is changed yet.

    `heads` are modules to train whole if the model has them. `names` are the exact targets, whatever the
    config's patterns say; `found` the model's modules, where they were walked through already.
    """
    settled = settle(model, config, method)
    found = list(places(model)) if found is None else found
    modules = [place.name for place in found]
    if names is None:
        settled |= converted(config, settled.get("target_modules", config.target_modules), model, found)
    planned = changed(config, settled)
    heads = heads or HEADS.get(str(config.task_type), ())
    if heads:
        planned.modules_to_save = present(planned.modules_to_save or [], heads, modules) or None
    names = method.choose(planned, modules) if names is None else names
    if names is not None:
        planned.target_modules = exactly(names, modules)
        planned.exclude_modules = planned.layers_to_transform = planned.layers_pattern = None
    plan = planning.make(
        found,
        planned,
        method,
        output_layers=output_layers(model, found, config.task_type),
        input_embeddings=input_embeddings(model, found),
        strict=strict,
    )
    _check_skipped(plan, config, model_type(model))
    targets = planned.target_modules if names is None else None
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = settled["target_modules"] = set(plan.selection.targets)
    if isinstance(targets, set) and len(targets) >= LONG_LIST and method.name != PeftType.IA3:
        matched = set(plan.selection.targets) | set(plan.selection.excluded)
        short = _native.shortest_suffixes(sorted(matched), [name for name in modules if name not in matched])
        if len(short) < len(targets):
            settled["target_modules"] = set(short)
    if config.fan_in_fan_out is not None:
        settled |= _orientation(plan, config.fan_in_fan_out)
    return plan, settled


def uneven(config: TargetedConfig, plan: Plan) -> list[str]:
    """What to say of lists of layers that short names of a config match in few of: hybrid models, more often
    than not.

    Whoever numbers layers, or gives a pattern, means some of them.
    """
    stated = config.target_modules
    numbered = isinstance(stated, str) and stated.lower() != ALL_LINEAR
    numbered = numbered or any(
        part.isdecimal() for name in stated or () for part in name.split(".") if not isinstance(stated, str)
    )
    if (
        numbered
        or config.inference_mode
        or config.layers_to_transform is not None
        or config.is_adaption_prompt
    ):
        return []
    found = coverage([place.name for place in plan.found], [target.spec.name for target in plan.targets])
    return [f"{one}: the others have no module that the config names" for one in found if one.uneven]


def present(names: list[str], heads: tuple[str, ...], modules: list[str]) -> list[str]:
    """The names without those heads that the model does not have: task classes list every usual one."""
    return [
        name
        for name in names
        if name not in heads or any(module == name or module.endswith(f".{name}") for module in modules)
    ]


def output_layers(model: nn.Module, found: list[Place], task_type: Any = None) -> frozenset[str]:
    """The layers that "all-linear" leaves out: the output embedding, else a classifier's head."""
    if not hasattr(model, "get_output_embeddings"):
        return frozenset()
    output = embedding_layers(model)[1]
    if output is None and task_type == TaskType.SEQ_CLS:
        output = next(
            (head for name in CLASSIFIERS if (head := getattr(model, name, None)) is not None), None
        )
    return frozenset() if output is None else frozenset(_name_of(found, output))


def input_embeddings(model: nn.Module, found: list[Place]) -> str | None:
    """The name of the layer that embeds the model's inputs, where it says so."""
    layer = embedding_layers(model)[0]
    return None if layer is None else next(iter(_name_of(found, layer)), None)


def _name_of(found: list[Place], layer: nn.Module) -> list[str]:
    sought = original(layer)
    return [place.name for place in found if original(place.module) is sought]


def _check_skipped(plan: Plan, config: TargetedConfig, kind: str) -> None:
    if config.peft_type in SKIPPING:
        skipped = SKIPPED.get(kind, frozenset())
        found = sorted({t.place.attribute for t in plan.targets if t.place.attribute in skipped})
        if found:
            names = ", ".join(found)
            raise ConfigError(
                f"`target_modules`: {names} is incompatible with Mamba-based models ({kind}), whose kernels"
                " read its weight without calling it; leave it out"
            )


def _orientation(plan: Plan, stated: bool) -> dict[str, bool]:
    """`fan_in_fan_out` as the layers are: files state it, and the layers know it themselves."""
    bases = [target.base for target in plan.targets]
    if any(base is dense.TRANSPOSED for base in bases):
        found = True
    elif any(base is dense.LINEAR for base in bases):
        found = False
    else:
        found = stated
    if found == stated:
        return {}
    kind = "Conv1D" if found else "torch.nn.Linear"
    warnings.warn(
        f"fan_in_fan_out is set to {stated} but the target module is `{kind}`. Setting fan_in_fan_out to"
        f" {found}.",
        PeftrsWarning,
        stacklevel=6,
    )
    return {"fan_in_fan_out": found}
