"""Which modules a config's patterns name."""

from __future__ import annotations

from typing import Any

from peftrs import _native
from peftrs.bases.kinds import LayerKind
from peftrs.bases.resolve import resolve
from peftrs.config import TargetedConfig
from peftrs.core.replace import ReplacedModule
from peftrs.core.tree import Place, original

ALL_LINEAR = "all-linear"


def select(
    found: list[Place], config: TargetedConfig, output_layers: frozenset[str] = frozenset()
) -> _native.Selection:
    """The config's patterns applied to the names of these modules."""
    layers, pattern, parameters = config.layers_to_transform, config.layers_pattern, config.target_parameters
    return _native.select(
        [place.name for place in found],
        target_modules=in_order(config.target_modules),
        exclude_modules=in_order(config.exclude_modules),
        linear=(
            [place.name for place in found if is_linear(place) and place.name not in output_layers]
            if is_all(config)
            else []
        ),
        layers_to_transform=[layers] if isinstance(layers, int) else layers,
        layers_pattern=[pattern] if isinstance(pattern, str) and pattern else pattern or None,
        modules_to_save=config.modules_to_save,
        feedforward_modules=in_order(config.feedforward_modules),
        parameters=(
            [f"{p.name}.{name}" for p in found for name in original(p.module)._parameters]
            if parameters
            else []
        ),
        target_parameters=in_order(parameters),
        patterns={name: list(getattr(config, name) or {}) for name in config.pattern_fields},
    )


def is_all(config: TargetedConfig) -> bool:
    """Whether the targets are a word that stands for all linear layers."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def is_linear(place: Place) -> bool:
    """Whether "all-linear" may stand for the module."""
    base = resolve(original(place.module))
    return base is not None and base.kind is LayerKind.LINEAR and not isinstance(place.module, ReplacedModule)


def in_order(value: Any) -> Any:
    """A set as a sorted list, anything else as it is."""
    return sorted(value) if isinstance(value, (set, frozenset)) else value
