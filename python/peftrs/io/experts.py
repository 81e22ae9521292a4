"""LoRA factors of experts one by one, as those of the parameter that holds them all.

Of the layers that stand under each other in one expert's matrix, `A (r, in)` come one after the other and `B
(out, r)` along the diagonal, so that each still changes its own rows: `[B₁ 0; 0 B₂] [A₁; A₂]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftrs.bases.experts import Experts, Holder, experts_of, holders
from peftrs.config import TargetedConfig
from peftrs.core.tree import original, places, users_model
from peftrs.io.checkpoint import PREFIX, Source
from peftrs.io.entries import entries

ONE = re.compile(r"(?P<holder>.+)\.(?P<expert>\d+)\.(?P<layer>\w+)\.lora_(?P<side>[AB])\.weight")


def joined_down(factors: Sequence[Tensor]) -> Tensor:
    """`A (experts, r, in)` of the layers, as (experts * r, in): an expert's ranks together."""
    return torch.cat(list(factors), 1).flatten(0, 1)


def joined_up(factors: Sequence[Tensor]) -> Tensor:
    """`B (experts, out, r)` of the layers, as (out, r * experts): a rank's experts together."""
    diagonal: Any = torch.block_diag
    blocks = torch.stack([diagonal(*of_one) for of_one in zip(*factors, strict=True)])
    return blocks.permute(1, 2, 0).flatten(1)


class Fused:
    """Another source whose factors of single experts are joined where the model needs that."""

    def __init__(
        self, source: Source, parts: dict[str, tuple[str, list[list[str]]]], renamed: dict[str, str]
    ) -> None:
        self.origin = source.origin
        self._source = source
        self._parts = parts
        """For each joined tensor: its side, and for each layer the names of its experts' factors in the
        source.
        """
        taken = {name for _, layers in parts.values() for names in layers for name in names}
        self._plain = {renamed.get(name, name): name for name in source.described() if name not in taken}

    def __len__(self) -> int:
        return len(self._parts) + len(self._plain)

    def described(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        own = self._source.described()
        found = {new: own[old] for new, old in self._plain.items()}
        for name, (side, layers) in self._parts.items():
            dtype, count = own[layers[0][0]][0], len(layers[0])
            shapes = [own[names[0]][1] for names in layers]
            ranks = sum(shape[0 if side == "A" else 1] for shape in shapes)
            wide = shapes[0][1] if side == "A" else sum(shape[0] for shape in shapes)
            found[name] = dtype, ((count * ranks, wide) if side == "A" else (wide, ranks * count))
        return found

    def read(self, name: str) -> Tensor:
        return self.read_all([name])[0][name]

    def read_all(self, names: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
        own = {name: self._own(name) for name in names}
        read, odd = self._source.read_all([one for held in own.values() for one in held])
        return {name: self._made(name, read) for name in names}, [
            name for name in names if not set(odd).isdisjoint(own[name])
        ]

    def _own(self, name: str) -> list[str]:
        """The names in the source of what a tensor is made of."""
        return (
            [one for names in self._parts[name][1] for one in names]
            if name in self._parts
            else [self._plain[name]]
        )

    def _made(self, name: str, read: dict[str, Tensor]) -> Tensor:
        if name not in self._parts:
            return read[self._plain[name]]
        side, layers = self._parts[name]
        factors = [torch.stack([read[one] for one in names]) for names in layers]
        return joined_down(factors) if side == "A" else joined_up(factors)

    def originals(self, name: str) -> tuple[str, ...]:
        return tuple(old for one in self._own(name) for old in self._source.originals(one))


def fused(model: nn.Module, adapter: str, config: TargetedConfig, source: Source) -> Source:
    """The source as the model needs it: itself, unless it holds factors of experts that are one parameter
    here.
    """
    inner = users_model(model)
    experts = experts_of(inner)
    if not experts.fusions:
        return source
    modules = {place.name: original(place.module) for place in places(inner)}
    held = {
        (holder.name, layer): holder for holder in holders(experts, modules) for layer in holder.fusion.layers
    }
    keys = {
        (e.owner.spec.name, e.slot): e.key for e in entries(model, adapter, config) if e.owner is not None
    }
    described = source.described()
    found: dict[tuple[Holder, str], dict[str, dict[int, str]]] = {}
    renamed = {}
    for name in described:
        plain = _spelled(name.removeprefix(PREFIX), experts, modules)
        match = ONE.fullmatch(plain)
        holder = held.get((match["holder"], match["layer"])) if match else None
        if match and holder is not None:
            layers = found.setdefault((holder, match["side"]), {})
            layers.setdefault(match["layer"], {})[int(match["expert"])] = name
        elif plain != name.removeprefix(PREFIX):
            renamed[name] = PREFIX + plain if name.startswith(PREFIX) else plain
    parts = {}
    for (holder, side), layers in found.items():
        key = keys.get((holder.parameter, f"lora_{side}.weight"))
        ordered = [
            [layers.get(layer, {}).get(at, "") for at in range(holder.experts)]
            for layer in holder.fusion.layers
        ]
        alike = [{described[name] for name in names if name} for names in ordered]
        # What is not whole is left as it is, and told as what the model does not know.
        if (
            key is not None
            and all(all(names) for names in ordered)
            and all(len(kinds) == 1 for kinds in alike)
        ):
            parts[key] = side, ordered
    return Fused(source, parts, renamed) if parts or renamed else source


def _spelled(name: str, experts: Experts, modules: dict[str, nn.Module]) -> str:
    """A tensor's name as the model has it now, where it is known by another one."""
    for old, new in experts.renamed:
        other = name.replace(old, new)
        path = other.partition(".lora_")[0]
        match = ONE.fullmatch(other)
        if other != name and (path in modules or (match is not None and match["holder"] in modules)):
            return other
    return name
