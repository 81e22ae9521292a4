"""What layers are: their kinds, their affine maps, and what is known of one before it is adapted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LayerKind(StrEnum):
    """What a layer computes, as far as methods tell layers apart."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    CONV1D = "conv1d"
    CONV2D = "conv2d"
    CONV3D = "conv3d"
    ATTENTION = "attention"
    """The joint input projection of `nn.MultiheadAttention`, which its forward reads by itself."""
    SELF_ATTENTION = "self_attention"
    """A decoder's attention as a whole, over projections that are layers of their own."""
    PARAMETER = "parameter"
    """A bare parameter that its owner's forward reads by itself, such as a stack of experts."""


CONVOLUTIONS = (LayerKind.CONV1D, LayerKind.CONV2D, LayerKind.CONV3D)
"""A tuple, not a set: torch 2.6 cannot trace membership of a set of enum members."""


class Affine(NamedTuple):
    """An affine map: weight `(out, in, *kernel)` or `(experts, out, in)`, and bias `(out,)` if there is
    one.
    """

    weight: Tensor
    bias: Tensor | None


class Term(NamedTuple):
    """What an adapter of low rank is: `scale · up @ down` added to the weight, and `scale · shift` to the
    bias.

    Over a linear layer, `y = x·Wᵀ + b + scale · (dropout(x)·downᵀ·upᵀ + shift)`.
    """

    up: Tensor
    """`(out, r)`, for a stack of experts `(experts, out, r)`."""
    down: Tensor
    """`(r, in · kernel)`, for a stack of experts `(experts, r, in)`."""
    scale: float | Tensor
    shift: Tensor | None = None
    """`(out,)`"""
    dropout: float = 0.0
    """The share of the input that training drops before it meets `down`."""
    exempt: int = 0
    """How many of the last ranks see the whole input, whatever `dropout` is."""

    def added(self, affine: Affine) -> Affine:
        """The map with this change in it, in float32 or a wider dtype of its own."""
        weight, up, down = affine.weight, self.up, self.down
        if (
            weight.ndim == 2
            and weight.dtype is up.dtype is down.dtype is torch.float32
            and type(self.scale) is float
        ):
            weight = torch.addmm(weight, up, down, alpha=self.scale)
        else:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            weight = weight.to(dtype) + self.scale * (up.to(dtype) @ down.to(dtype)).reshape(weight.shape)
        if self.shift is None:
            return Affine(weight, affine.bias)
        shift = self.scale * self.shift.to(weight.dtype)
        return Affine(weight, shift if affine.bias is None else affine.bias + shift)


class Deferred:
    """An affine map that is computed when its weight or bias is read: most first values of adapters need
    neither.
    """

    def __init__(self, compute: Callable[[], Affine]) -> None:
        self.compute = compute

    @cached_property
    def affine(self) -> Affine:
        """The map itself."""
        return self.compute()

    @property
    def weight(self) -> Tensor:
        """As of `Affine`."""
        return self.affine.weight

    @property
    def bias(self) -> Tensor | None:
        """As of `Affine`."""
        return self.affine.bias


@dataclass(frozen=True)
class LayerSpec:
    """What is known of a layer before it is adapted. `shape` is that of the presented weight."""

    name: str
    kind: LayerKind
    shape: tuple[int, ...]
    bias: bool = False
    groups: int = 1
    strength: float = 1.0
    """What changes of this layer are multiplied by on top of their own scaling, as the files of such layers
    mean it.
    """
    matched: Mapping[str, Any] = field(default_factory=dict)
    """The value that each of the config's pattern fields gives this layer, where a key of it matched."""
    tied: str | None = None
    """The layer whose tensors an adapter on this one shares, where both have one weight."""

    @property
    def stacked(self) -> bool:
        """Whether the weight is a stack of experts, `(experts, out, in)`."""
        return self.kind is LayerKind.PARAMETER and len(self.shape) == 3

    @property
    def out_features(self) -> int:
        """Rows of the presented weight: features, channels, or the width of an embedding."""
        return self.shape[1] if self.stacked else self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the presented weight: features, input channels (of all groups), or rows of an
        embedding's table.
        """
        return self.shape[2] if self.stacked else self.shape[1] * self.groups


def along_channels(vector: Tensor, spec: LayerSpec) -> Tensor:
    """`vector`, one value a channel, shaped to broadcast over the activations of a layer of this kind."""
    if spec.kind not in CONVOLUTIONS:
        return vector
    return vector.view(-1, *[1] * (len(spec.shape) - 2))
