"""What an adapter would change, found and checked before anything is changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from peftrs import _native
from peftrs.bases import dense, offload, parallel
from peftrs.bases.base import Base
from peftrs.bases.kinds import LayerKind
from peftrs.bases.resolve import resolve
from peftrs.config import NO_TARGETS, TargetedConfig
from peftrs.core.layer import AdaptedLayer
from peftrs.core.method import Method
from peftrs.core.replace import ReplacedModule
from peftrs.core.select import in_order, select
from peftrs.core.target import PROJECTION, Plan, Target, aim
from peftrs.core.tree import Place, original
from peftrs.errors import (
    ConfigError,
    NoMatchingPeftModuleError,
    Strict,
    TargetError,
    UnfitError,
    complain,
    joined,
    listed,
    shown,
)
from peftrs.planning import tying


def make(
    found: list[Place],
    config: TargetedConfig,
    method: Method,
    *,
    output_layers: frozenset[str] = frozenset(),
    input_embeddings: str | None = None,
    strict: Strict = None,
) -> Plan:
    """Finds what the adapter changes among a model's modules, changing nothing.

    `output_layers` are left out of "all-linear"; `input_embeddings` names the table that a plain list of
    `trainable_token_indices` is for. Raises `TargetError` where nothing matches or entries of a list match
    nothing (a warning unless `strict`), `ConfigError` where layers cannot be adapted as asked: every fault of
    a kind at once.
    """
    selection = select(found, config, output_layers)
    _check_matches(selection, config, strict)
    faults: list[str] = []
    targets = _targets(found, selection, config, method.variant(config), faults)
    targets += tying.token_rows(found, config, input_embeddings, faults)
    followers = tying.followers(found, config, targets)
    led = {(one.spec.name, one.method.name) for one in followers}
    targets = [one for one in targets if (one.spec.name, one.method.name) not in led] + followers
    twice = [name for name, count in Counter(target.spec.name for target in targets).items() if count > 1]
    faults += [
        f"{name}: `trainable_token_indices` replaces rows of a layer that is a target too; choose one"
        for name in twice
    ]
    # The first module's parent is the model itself.
    targets = [_lying(found[0].parent, _settled(target, config, faults), faults) for target in targets]
    saved = tying.saved(found, config, selection.modules_to_save)
    faults += _saved_faults(saved, targets)
    if faults:
        raise UnfitError(joined(faults))
    return Plan(found, targets, saved, selection)


def _settled(target: Target, config: TargetedConfig, faults: list[str]) -> Target:
    """The target with the settings of its layer."""
    method, spec = target.method, target.spec
    try:
        target = replace(target, values=method.settle(config, spec))
    except ConfigError as error:
        faults.append(f"{spec.name}: {error}")
    else:
        if spec.tied is not None and not tying.shares(target, config):
            faults.append(
                f"{spec.name}: {method.name} cannot share its tensors with the tied layer {spec.tied!r}"
            )
    return target


def _lying(model: nn.Module, target: Target, faults: list[str]) -> Target:
    """The target with how its layer lies over processes, where it does."""
    try:
        found = parallel.resolve(model, target.place.name, original(target.place.module), target.base)
    except ConfigError as error:
        faults.append(str(error))
        return target
    if found is not None and not target.method.parallel:
        faults.append(f"{target.spec.name}: {target.method.name} does not work on tensor-parallel layers")
    return target if found is None else replace(target, parallel=found)


def _saved_faults(saved: list[tuple[Place, str | None]], targets: list[Target]) -> list[str]:
    """Why modules cannot be trained whole, or layers not adapted, since one wrapper would stand inside the
    other.
    """
    faults, whole = [], {place.name for place, _ in saved}
    for place, _ in saved:
        if isinstance(place.module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            faults.append(
                f"{place.name}: a {type(place.module).__name__} cannot be trained whole; name its members"
            )
        elif any(isinstance(module, AdaptedLayer) for module in place.module.modules()):
            faults.append(
                f"{place.name}: holds layers that other adapters change, so it cannot be trained whole"
            )
        elif coarse := [name for name, one in place.module.named_parameters() if not one.is_floating_point()]:
            faults.append(f"{place.name}: {listed(coarse)} are quantized, which cannot be trained whole")
    for target in targets:
        name = target.place.name
        if any(name == other or name.startswith(f"{other}.") for other in whole):
            faults.append(f"{name}: is a target and trained whole (`modules_to_save`); choose one")
        elif isinstance(target.place.module, ReplacedModule):
            faults.append(f"{name}: another adapter trains this module whole, so it cannot be adapted")
    return faults


def _targets(
    found: list[Place],
    selection: _native.Selection,
    config: TargetedConfig,
    method: Method,
    faults: list[str],
) -> list[Target]:
    by_name = {place.name: place for place in found}
    modules = set(selection.targets)
    wanted: list[tuple[str, Place, str | None]] = [(name, by_name[name], None) for name in selection.targets]
    for name in selection.parameters:
        owner, _, own_name = name.rpartition(".")
        wanted.append((name, by_name[owner], own_name))
        if owner in modules:
            faults.append(f"{name}: its module is a target too; name either the module or its parameters")
    targets: list[Target] = []
    matched_by = _matched(selection, config, len(wanted))
    for (name, place, parameter), matched in zip(wanted, matched_by, strict=True):
        if _in_attention(place) and place.name.rpartition(".")[0] in modules:
            continue
        base = _base(place, parameter)
        if base is None or base.kind not in method.layers:
            kind = type(original(place.module)).__name__
            faults.append(
                f"Target module {name} is not supported: {method.name} adapts"
                f" {', '.join(sorted(method.layers))} layers, not {kind}"
            )
            continue
        if base.opaque and offload.hook_of(original(place.module)) is not None:
            faults.append(
                f"{name}: accelerate keeps it elsewhere between calls, and what calls it reads it past its"
                " adapter; hint: keep this module in memory in the device map"
            )
            continue
        targets.append(aim(place, base, method, matched, name=name))
        if base.kind is LayerKind.ATTENTION:
            inner = original(place.module)
            projection = Place(f"{name}.out_proj", inner.get_submodule("out_proj"), inner, "out_proj", [])
            targets.append(aim(projection, dense.LINEAR, method, matched, strength=PROJECTION))
    return targets


def _base(place: Place, parameter: str | None) -> Base | None:
    inner = original(place.module)
    if parameter is None:
        return resolve(inner)
    weight = getattr(inner, parameter)
    if weight.ndim not in (2, 3):
        return None
    return dense.Parameter(
        parameter, transposed=weight.ndim == 3 and bool(getattr(inner, "is_transposed", False))
    )


def _matched(selection: _native.Selection, config: TargetedConfig, count: int) -> list[dict[str, Any]]:
    """The value that each pattern field of the config gives each of the layers selected, where a key of it
    matched.
    """
    matched: list[dict[str, Any]] = [{} for _ in range(count)]
    for field in config.pattern_fields:
        values = list((getattr(config, field) or {}).values())
        for one, key in zip(matched, selection.pattern_index(field) if values else (), strict=False):
            if key >= 0:
                one[field] = values[key]
    if config.feedforward_modules:
        for one, is_feedforward in zip(matched, selection.feedforward, strict=False):
            one["feedforward_modules"] = is_feedforward
    return matched


def _in_attention(place: Place) -> bool:
    return isinstance(original(place.parent), nn.MultiheadAttention) and place.attribute == "out_proj"


def _check_matches(selection: _native.Selection, config: TargetedConfig, strict: Strict) -> None:
    targets = in_order(config.target_modules)
    wants_none = targets in (NO_TARGETS, [NO_TARGETS]) or (
        not targets and bool(config.trainable_token_indices)
    )
    if not selection.targets and not selection.parameters and not wants_none:
        raise NoMatchingPeftModuleError(_nothing(selection, config))
    lost = [
        f"{field}: {shown(entry)}" + (f" (the nearest name is {nearest!r})" if nearest else "")
        for field, entry, count, nearest in selection.report
        if not count and entry != NO_TARGETS
    ]
    if lost:
        complain(f"nothing in the model matches {', '.join(lost[:8])}", TargetError, strict)


def _nothing(selection: _native.Selection, config: TargetedConfig) -> str:
    named = config.target_modules
    targets = f"[{listed(sorted(named))}]" if isinstance(named, (list, set)) else shown(named or "")
    if selection.excluded:
        return (
            f"All modules were excluded: {targets} matches only {listed(selection.excluded)}, which"
            " `exclude_modules` takes out"
        )
    message = (
        f"Target modules {targets} not found in the base model. Please check the target modules and try"
        " again."
    )
    for name in ("layers_to_transform", "layers_pattern"):
        if value := getattr(config, name):
            message += f" `{name}` is {value!r:.120}."
    nearest = [f"{shown(entry)} is near {near!r}" for _, entry, _, near in selection.report if near]
    return message + (f" {', '.join(nearest[:8])}." if nearest else "")
