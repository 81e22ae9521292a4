"""Experts that transformers 5 keeps in one parameter, and whose layers were modules of their own before.

Adapters made then name those layers. What became of them follows from the conversions that transformers
itself has for checkpoints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

SOURCE = re.compile(r"(?:^|\.)(?P<holder>\w+)\.\*\.(?P<layer>\w+)\.weight$")

HOLDERS = "experts"
"""What the names of all modules hold that transformers brings experts together in."""


@dataclass(frozen=True)
class Fusion:
    """The layers of one expert that stand under each other in `parameter` of the module `holder` of all
    experts.
    """

    holder: str
    layers: tuple[str, ...]
    parameter: str


@dataclass(frozen=True)
class Experts:
    """What became of a model's experts, and which parts of names changed with it."""

    fusions: tuple[Fusion, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Holder:
    """A module that holds the experts of one layer, by its name in the model, and how many they are."""

    name: str
    fusion: Fusion
    experts: int

    @property
    def parameter(self) -> str:
        """The full name of the parameter."""
        return f"{self.name}.{self.fusion.parameter}"


def experts_of(model: nn.Module) -> Experts:
    """What transformers does to the experts in checkpoints of the model's kind; nothing for all other
    models.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    # transformers' first answer takes longer than all our imports, and is nothing for models without experts.
    if not isinstance(kind, str) or all(HOLDERS not in name for name, _ in model.named_modules()):
        return Experts()
    return _experts(kind)


@cache
def _experts(kind: str) -> Experts:
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        # Before version 5 experts are modules.
        return Experts()
    fusions, renamed = [], []
    for conversion in get_checkpoint_conversion_mapping(kind) or ():
        found = fusion_of(conversion)
        if found is not None:
            fusions.append(found)
        elif not hasattr(conversion, "operations"):
            pairs = zip(conversion.source_patterns, conversion.target_patterns, strict=False)
            renamed += [
                (old, new)
                for old, new in pairs
                if re.fullmatch(r"[\w.]+", old) and re.fullmatch(r"[\w.]+", new)
            ]
    return Experts(tuple(fusions), tuple(renamed) if fusions else ())


def fusion_of(conversion: Any) -> Fusion | None:
    """The fusion that one of transformers' conversions is, or None if it is another kind."""
    operations = [type(one).__name__ for one in getattr(conversion, "operations", None) or ()]
    if (
        operations not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
        or len(conversion.target_patterns) != 1
    ):
        return None
    found = [SOURCE.search(pattern) for pattern in conversion.source_patterns]
    holder, _, parameter = conversion.target_patterns[0].rpartition(".")
    if not all(found) or any(one is not None and one["holder"] != holder.rpartition(".")[2] for one in found):
        return None
    return Fusion(
        holder.rpartition(".")[2], tuple(one["layer"] for one in found if one is not None), parameter
    )


def holders(experts: Experts, modules: dict[str, nn.Module]) -> list[Holder]:
    """The modules, by name, that hold such parameters."""
    found = []
    for name, module in modules.items():
        for fusion in experts.fusions:
            held = (
                module._parameters.get(fusion.parameter) if name.rpartition(".")[2] == fusion.holder else None
            )
            if held is not None and held.ndim == 3:
                found.append(Holder(name, fusion, held.shape[0]))
    return found
