"""LoRA factors of a higher rank that change the same: filled up with zeros, and configs that state them."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftrs.core.slots import FittedAdapter
from peftrs.core.tree import adapted_layers, places
from peftrs.planning.settle import exactly

DOWN = ("lora_A.weight", "lora_embedding_A")
UP = ("lora_B.weight", "lora_embedding_B")

Value = TypeVar("Value")


def padded(fitted: FittedAdapter, slot: str, shape: torch.Size) -> Tensor | None:
    """A slot's tensor in another shape, filled up with zeros in the ranks that it lacks; None where it cannot
    be.

    The ranks of a group of channels, or of an expert, stand together in `A`; those of the experts alternate
    in `B`.
    """
    value = fitted[slot]
    if value.shape == shape:
        return value
    if value.ndim != len(shape) or slot not in DOWN + UP:
        return None
    experts = fitted.spec.shape[0] if fitted.spec.stacked else 1
    if slot in DOWN:
        blocks = experts if fitted.spec.stacked else fitted.spec.groups
        whole, part = (one.view(blocks, -1, *one.shape[1:]) for one in (value.new_zeros(shape), value))
    else:
        whole, part = (
            one.view(len(one), -1, experts, *one.shape[2:]) for one in (value.new_zeros(shape), value)
        )
    if part.shape[1] > whole.shape[1] or part.shape[:1] + part.shape[2:] != whole.shape[:1] + whole.shape[2:]:
        return None
    whole[:, : part.shape[1]] = part
    found: Tensor = whole.flatten(0, 1) if slot in DOWN else whole.flatten(1, 2)
    return found


def folded(base: nn.Module, adapter: str, config: Any) -> dict[str, Any]:
    """The fields of an adapter's config as its tensors are: their ranks, and alphas that give the strengths
    that it has.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, fitted in _factored(base, adapter).items():
        rank = _rank(fitted)
        alpha = round(
            float(fitted.scaling) / fitted.spec.strength * (math.sqrt(rank) if config.use_rslora else rank), 6
        )
        ranks[name], alphas[name] = rank, int(alpha) if alpha == int(alpha) else alpha
        fitted.settle(fitted.values | {"r": rank, "lora_alpha": alphas[name]})
    rank, alpha = _usual(ranks), _usual(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exact(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {_exact(name): value for name, value in alphas.items() if value != alpha},
    }


def targeted(base: nn.Module, adapter: str, config: Any) -> dict[str, Any]:
    """The fields of an adapter's config that name its layers, by all that have it."""
    if config.target_parameters:
        return {}
    # An attention brings its output projection along.
    names = {name for name, fitted in _factored(base, adapter).items() if fitted.spec.strength == 1}
    targets = exactly(names, [place.name for place in places(base)])
    return {
        "target_modules": targets,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _factored(base: nn.Module, adapter: str) -> dict[str, FittedAdapter]:
    held = [layer.adapters[adapter] for layer in adapted_layers(base) if adapter in layer.adapters]
    return {fitted.spec.name: fitted for fitted in held if "r" in fitted.values}


def _usual(values: dict[str, Value]) -> Value:
    return Counter(values.values()).most_common(1)[0][0]


def _rank(fitted: FittedAdapter) -> int:
    slot = next(slot for slot in DOWN if slot in fitted)
    rows = fitted[slot].shape[1 if fitted.shares and slot == UP[1] else 0]
    return rows // (fitted.spec.shape[0] if fitted.spec.stacked else 1)


def _exact(name: str) -> str:
    return f"^{re.escape(name)}$"
