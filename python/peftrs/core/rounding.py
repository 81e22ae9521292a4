"""Merging into layers whose weights are quantized: what rounding to their format again makes of an update.

A stored weight lies on its format's grid, so that an update of less than half a step rounds away in full;
formats that choose another grid add an error that may be far larger than the update. Both are measured, and a
merge that would lose most of the update or drown it is refused: the same weights in 16 bits keep it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from peftrs.bases.dense import LINEAR
from peftrs.bases.kinds import Affine
from peftrs.bases.quantized import IN_A_DTYPE, Quantized
from peftrs.bases.sharded import is_distributed
from peftrs.errors import MergeError, PeftrsWarning, complain

if TYPE_CHECKING:
    from peftrs.core.fold import Chain
    from peftrs.core.layer import AdaptedLayer

BLOCK = 256
"""Rows that are looked at together."""
LEAST, LARGEST = 0.5, 10.0
"""The share of an update that must be left of it, and how many times its size the error may be."""


@dataclass(frozen=True)
class Rounding:
    """What a format made of an update `D` of one weight, as sums over its entries.

    `E` is the change that was stored.
    """

    layer: str
    format: str
    asked: float
    """`‖D‖²`"""
    along: float
    """`⟨D, E⟩`"""
    missed: float
    """`‖D - E‖²`"""

    @property
    def kept(self) -> float:
        """The share of the update that was stored: 1 all of it, 0 none."""
        return _share(self.along, self.asked)


def _share(along: float, asked: float) -> float:
    return along / asked if asked else 1.0


def coarse(layer: AdaptedLayer) -> bool:
    """Whether the layer's weights are quantized."""
    return layer.base.quantized


def widened(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that holds all numbers of the tensor's own and of another one, if there is one."""
    return (
        tensor.dtype if dtype is None or is_distributed(tensor) else torch.promote_types(tensor.dtype, dtype)
    )


def rounded_twice(layer: AdaptedLayer, dtype: torch.dtype | None) -> bool:
    """Whether what is merged was rounded to a coarser dtype than `dtype`, and the layer's originals are
    there.
    """
    if layer.ledger is None or layer.ledger.kept is None:
        return False
    stored = [one for one in layer.base.parameters(layer.base_layer) if one is not None]
    return coarse(layer) or any(widened(one, dtype) is not one.dtype for one in stored)


def before(layer: AdaptedLayer) -> nn.Module:
    """The frozen layer without what is merged."""
    kept = None if layer.ledger is None else layer.ledger.layer
    return layer.base_layer if kept is None else kept


def folded(layer: AdaptedLayer, chain: Chain) -> tuple[Tensor, Affine]:
    """The frozen layer's weight in float32, and its map with the chain in it.

    Raises `MergeError` where that is not finite.
    """
    weight, bias = layer.base.dense(before(layer))
    first = weight.float()
    affine = Affine(first, None if bias is None else bias.float())
    for adapter in chain:
        affine = adapter.method.apply(adapter, affine)
    for value in affine:
        if value is not None and not bool(value.isfinite().all()):
            raise MergeError(f"{layer.spec.name}: merging gives weights that are infinite or NaN")
    return first, affine


@torch.no_grad()
def requantize(layer: AdaptedLayer, chain: Chain) -> tuple[nn.Module, Rounding]:
    """A layer in the frozen one's format with the chain in it, and what rounding did to the change.

    Raises `MergeError`.
    """
    base, module = cast(Quantized, layer.base), before(layer)
    first, affine = folded(layer, chain)
    merged = base.requantized(module, affine)
    sums = torch.zeros(3, dtype=torch.float64)
    # By blocks of rows: the layer is there several times over already.
    for was, asked, stored in zip(
        *(torch.split(one, BLOCK) for one in (first, affine.weight, base.dense(merged).weight)), strict=True
    ):
        asked, stored = asked - was, stored.float() - was
        pairs = ((asked, asked), (asked, stored), (asked - stored, asked - stored))
        sums += torch.stack([(one * other).sum(dtype=torch.float64) for one, other in pairs]).cpu()
    whole, along, missed = sums.tolist()
    return merged, Rounding(layer.spec.name, base.format(module), whole, along, missed)


@torch.no_grad()
def dequantize(layer: AdaptedLayer, chain: Chain, dtype: torch.dtype) -> None:
    """Replaces the frozen layer by a dense one with the chain in it, for good. Raises `MergeError`."""
    _, affine = folded(layer, chain)
    base = cast(Quantized, layer.base)
    plain = base.plain(affine, dtype)
    for module in {layer.base_layer, before(layer)}:
        base.dropped(module)
    layer.base_layer, layer.base = plain.train(layer.base_layer.training), LINEAR


def check(layer: AdaptedLayer, chain: Chain, dtype: torch.dtype | None) -> None:
    """Raises `MergeError` for a format that cannot be written again, or for weights that would not be
    finite.
    """
    base = cast(Quantized, layer.base)
    if dtype is None and not base.writes:
        raise MergeError(
            f"{layer.spec.name}: {base.format(layer.base_layer)} is written by its library's calibration"
            f" alone; hint: {IN_A_DTYPE}"
        )
    if dtype is not None:
        _, affine = folded(layer, chain)
        if not bool(affine.weight.to(dtype).isfinite().all()):
            raise MergeError(
                f"{layer.spec.name}: merging gives weights beyond {dtype}; hint: merge into a wider dtype"
            )


def judge(found: Sequence[Rounding]) -> None:
    """Tells what rounding did to the updates of a merge.

    Raises `MergeError` (a warning where not strict) if it is lost.
    """
    asked = sum(one.asked for one in found)
    if not asked:
        return
    kept = _share(sum(one.along for one in found), asked)
    noise = (sum(one.missed for one in found) / asked) ** 0.5
    worst = min(found, key=lambda one: one.kept)
    formats = ", ".join(sorted({one.format for one in found}))
    told = (
        f"{len(found)} merged layers are quantized again ({formats}): {kept:.0%} of the update is left, with"
        f" an error of {noise:.0%} of its size; least in {worst.layer}: {worst.kept:.0%}"
    )
    if kept < LEAST or noise > LARGEST:
        complain(f"{told}. That rounds the update away; hint: {IN_A_DTYPE}", MergeError)
    else:
        warnings.warn(told, PeftrsWarning, stacklevel=4)
