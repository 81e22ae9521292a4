"""The contract between a method and the core: a change to a frozen layer, stated in two views.

The weight view is `apply`, an affine map in and one out; the activation view is `forward`. Merging folds the
first over the active adapters, the layer's forward folds the second, in the same order, so that the two
cannot disagree.

Weights are presented as `(out, in, *kernel)` whatever way a layer stores them; stacks of experts as
`(experts, out, in)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base
from peftrs.bases.kinds import Affine, LayerKind, LayerSpec, along_channels
from peftrs.config import TargetedConfig
from peftrs.core.shortcut import Product
from peftrs.ops.lora_linear.reference import Unstored


class Side(Enum):
    """Where a method acts, which decides who acts first when several adapters are active."""

    INPUT = "input"
    OUTPUT = "output"


class Below(Protocol):
    """What lies beneath an adapter: the frozen layer, already changed by the adapters under this one."""

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode, which is when dropout acts."""

    @property
    def module(self) -> nn.Module:
        """The frozen layer itself."""

    @property
    def base(self) -> Base:
        """What kind of layer it is."""

    @property
    def options(self) -> dict[str, Any]:
        """The further arguments of this call, by name."""

    def __call__(self, x: Tensor) -> Tensor:
        """The output for `x`, bias included."""

    def dense(self) -> Affine:
        """The same as an affine map; to be read, never written."""

    def weight(self, dtype: torch.dtype) -> tuple[Tensor | Unstored, Tensor | None]:
        """As `dense`, but a quantized weight is yet to be computed, in the dtype in which the layer takes an
        input of `dtype`.
        """

    def obstacle(self) -> str | None:
        """Why the output for `x` is more than the affine map of `dense` applied to it, or None if that is
        all.
        """

    def op(self, x: Tensor, affine: Affine) -> Tensor:
        """The layer's own operation (its strides, padding, lookup) with another affine map, in the dtype of
        `x`.
        """


class Adapter(Protocol):
    """One adapter on one layer, as its method sees it: settings, and tensors by slot name."""

    config: Any
    spec: LayerSpec
    values: dict[str, Any]
    scaling: float

    def __getitem__(self, slot: str) -> Tensor: ...

    def get(self, slot: str) -> Tensor | None: ...

    def __contains__(self, slot: object) -> bool: ...


class Method(ABC):
    """A kind of adapter. Instances hold no state: one serves every layer of every model."""

    name: str
    """The `peft_type` of its configs."""
    config: type[TargetedConfig]
    layers: frozenset[LayerKind]
    prefix: str
    """How its slots' names begin."""
    attributes: tuple[str, ...] = ()
    """Settings that a layer shows by adapter name, as `layer.r["default"]`."""
    tied_slots: Mapping[str, tuple[str, bool]] = MappingProxyType({})
    """For an output layer tied to an adapted embedding: each of its slots, the embedding's that it is, and
    whether transposed.
    """
    tied_kinds: frozenset[LayerKind] = frozenset({LayerKind.LINEAR})
    """The kinds of layers that may be so tied."""
    side: Side = Side.OUTPUT
    parallel = False
    """Whether its formulas work on layers spread over processes, which torch's `DTensor` must know all their
    operations for.
    """

    def side_of(self, adapter: Adapter) -> Side:
        """Where this adapter acts; the same for all unless a layer's settings decide."""
        return self.side

    def variant(self, config: Any) -> Method:
        """The method that this config asks for: this one, or one that it is the common name of."""
        return self

    def choose(self, config: Any, modules: Sequence[str]) -> set[str] | None:
        """The names of the modules to change, or None where the config's patterns say.

        Raises `ConfigError`.
        """
        return None

    def settle(self, config: Any, spec: LayerSpec) -> dict[str, Any]:
        """The settings of this layer, with the config's patterns resolved.

        Raises `ConfigError` for what it cannot do.
        """
        return {}

    def scale(self, config: Any, values: dict[str, Any]) -> float:
        """The factor that the change is multiplied by."""
        return 1.0

    @abstractmethod
    def slots(self, config: Any, spec: LayerSpec, values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that is trained and saved, by slot name as files spell it
        (`lora_A.weight`).
        """

    @abstractmethod
    def init(self, adapter: Adapter, base: Affine) -> None:
        """Fills the slots, allocated but not set, with their first values; `base` is read, never written."""

    def origin(self, adapter: Adapter, base: Affine) -> dict[str, Tensor]:
        """Tensors kept beside the slots but neither trained nor saved, since they follow from `base`; default
        none.
        """
        return {}

    def rebases(self, config: Any) -> bool:
        """Whether adapters of this config are for a base of other weights, which `rebase` computes."""
        return False

    def rebase(self, adapter: Adapter, base: Affine) -> Tensor:
        """The weight, `(out, in)`, that the layer gets beneath the adapter, once and for good."""
        raise NotImplementedError(f"{self.name} leaves the base as it is")

    @abstractmethod
    def apply(self, adapter: Adapter, affine: Affine) -> Affine:
        """The weight view: the changed map, in the dtype of `affine` or a wider one.

        Must be differentiable.
        """

    def conflict(self, adapters: Sequence[Adapter]) -> str | None:
        """Why these adapters of this method cannot act on one layer together, or None if they can."""
        return None

    def unmergeable(self, adapter: Adapter) -> str | None:
        """Why this adapter cannot become part of the layer's weights, or None if it can."""
        return None

    def obstacle(self, adapter: Adapter, below: Below) -> str | None:
        """Why this adapter and the layer beneath do not run as one operation, or None if they do."""
        return f"{self.name} has no fused form"

    def apart(self, adapters: Sequence[Adapter], below: Below) -> str | None:
        """Why these several adapters of this method do not run as one operation with the layer beneath, or
        None if they do.
        """
        return f"{self.name} has no form for several"

    def together(self, adapters: Sequence[Adapter], x: Tensor, below: Below) -> Tensor | None:
        """The output with all of them as one operation, where `apart` has nothing against it; None where `x`
        has.
        """
        return None

    def product(self, adapter: Adapter) -> Product | None:
        """What the adapter is where it is a product of two slots over a linear layer and nothing else, for
        `core.shortcut`.
        """
        return None

    def forward(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        """The activation view; by default the layer's own operation with the changed weights."""
        return below.op(x, self.apply(adapter, below.dense()))


class Additive(Method):
    """Adds `scaling * delta` to the weight. Supply `factors` if the change is of low rank, else `delta`."""

    def factors(self, adapter: Adapter) -> tuple[Tensor, Tensor] | None:
        """`(out, r)` and `(r, in * kernel)` whose product is the change before scaling (stacks: one more
        dimension first).
        """
        return None

    def delta(self, adapter: Adapter, dtype: torch.dtype) -> Tensor:
        """The change before scaling, in the shape of the presented weight, computed in `dtype`."""
        factors = self.factors(adapter)
        if factors is None:
            raise NotImplementedError(f"{self.name} supplies neither factors nor delta")
        up, down = factors
        return (up.to(dtype) @ down.to(dtype)).reshape(adapter.spec.shape)

    def shift(self, adapter: Adapter) -> Tensor | None:
        """The change of the bias before scaling, `(out,)`; default none."""
        return None

    def path(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        """The change of the output before scaling; supply it where it is cheaper than going through
        `delta`.
        """
        return below.op(x, Affine(self.delta(adapter, x.dtype), self.shift(adapter)))

    def apply(self, adapter: Adapter, affine: Affine) -> Affine:
        dtype = torch.promote_types(affine.weight.dtype, torch.float32)
        weight = affine.weight.to(dtype) + adapter.scaling * self.delta(adapter, dtype)
        shift = self.shift(adapter)
        if shift is None:
            return Affine(weight, affine.bias)
        bias = adapter.scaling * shift.to(dtype)
        return Affine(weight, bias if affine.bias is None else affine.bias + bias)

    def forward(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        y, path, scaling = below(x), self.path(adapter, x, below), cast(Any, adapter.scaling)
        if isinstance(scaling, Tensor):
            return (y + scaling * path).to(y.dtype)
        # One operation: a product with a number makes a tensor of its own and keeps the number for the
        # backward pass.
        return torch.add(y, path, alpha=scaling).to(y.dtype)


class Rotation(Method):
    """Turns the layer's input (or, on an embedding, its output) by an orthogonal map. Supply `turn`."""

    @abstractmethod
    def turn(self, adapter: Adapter, x: Tensor, *, transpose: bool = False, training: bool = False) -> Tensor:
        """`R x` for the vectors along the last dimension of `x`, or `Rᵀ x`; dropout of the map itself acts if
        `training`.
        """

    def side_of(self, adapter: Adapter) -> Side:
        return Side.OUTPUT if adapter.spec.kind is LayerKind.EMBEDDING else Side.INPUT

    def apply(self, adapter: Adapter, affine: Affine) -> Affine:
        return self._turned(adapter, affine, training=False)

    def _turned(self, adapter: Adapter, affine: Affine, training: bool) -> Affine:
        weight = affine.weight.to(torch.promote_types(affine.weight.dtype, torch.float32))
        if self.side_of(adapter) is Side.OUTPUT:
            return Affine(self.turn(adapter, weight.mT, training=training).mT, affine.bias)
        # Row i of W·R is Rᵀ applied to row i of W; a convolution's patch is one vector of in * kernel
        # features.
        rows = self.turn(adapter, weight.flatten(1), transpose=True, training=training)
        return Affine(rows.reshape(weight.shape), affine.bias)

    def forward(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        if adapter.spec.kind is LayerKind.EMBEDDING:
            y = below(x)
            return self.turn(adapter, y, training=below.training).to(y.dtype)
        if adapter.spec.kind is LayerKind.LINEAR:
            return below(self.turn(adapter, x, training=below.training).to(x.dtype))
        return below.op(x, self._turned(adapter, below.dense(), below.training))


class Scaling(Method):
    """Multiplies the layer's inputs or outputs, channel by channel. Supply `vector` and `side_of`."""

    @abstractmethod
    def vector(self, adapter: Adapter) -> Tensor:
        """The factors, `(in,)` on the input side or `(out,)` on the output side."""

    def apply(self, adapter: Adapter, affine: Affine) -> Affine:
        vector = self.vector(adapter)
        trailing = affine.weight.ndim - 2
        if self.side_of(adapter) is Side.INPUT:
            # A grouped convolution's weight has the input channels of one group only: each group takes its
            # own factors.
            groups = adapter.spec.groups
            rows = vector.view(groups, 1, -1).expand(-1, affine.weight.shape[0] // groups, -1)
            return Affine(
                affine.weight * rows.reshape(*affine.weight.shape[:2], *[1] * trailing), affine.bias
            )
        bias = None if affine.bias is None else affine.bias * vector
        return Affine(affine.weight * vector.view(-1, 1, *[1] * trailing), bias)

    def forward(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        vector = along_channels(self.vector(adapter), adapter.spec)
        if self.side_of(adapter) is Side.INPUT:
            return below((x * vector).to(x.dtype))
        y = below(x)
        return (y * vector).to(y.dtype)
