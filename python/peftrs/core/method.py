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
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftrs import registry
from peftrs.bases.base import Base
from peftrs.bases.kinds import CONVOLUTIONS, Affine, LayerKind, LayerSpec, Term, along_channels
from peftrs.config import TargetedConfig


class Side(Enum):
    """Where a method acts, which decides who acts first when several adapters are active."""

    INPUT = "input"
    OUTPUT = "output"


class Of(NamedTuple):
    """Another layer's slot."""

    layer: str
    slot: str
    transposed: bool = False


class Slot(NamedTuple):
    """A tensor of an adapter on one layer."""

    shape: tuple[int, ...]
    trained: bool = True
    saved: bool = True
    dtype: torch.dtype | None = None
    """None: the adapter's."""
    of: Of | None = None
    """The slot of another layer that this one is, where layers share their tensors."""


Slots = Mapping[str, Slot | tuple[int, ...]]
"""Slots by name as files spell it (`lora_A.weight`); a bare shape stands for a slot of that shape."""


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

    def obstacle(self) -> str | None:
        """Why the output for `x` is more than the affine map of `dense` applied to it, or None if that is
        all.
        """

    def fused(self, x: Tensor, term: Term, *, biased: bool = True) -> Tensor | None:
        """The output for `x` with the term added, as one operation; None where that does not go.

        Without `biased` the layer's own bias is left out.
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
    unfactored: str | None = None
    """Why what it changes is nothing that a sum of low rank comes near, or None."""
    public = True
    """Whether it is a kind of adapter by itself, and not what a field of other kinds' configs adds."""
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
    def slots(self, config: Any, spec: LayerSpec, values: dict[str, Any]) -> Slots:
        """The tensors of an adapter on a layer; those of the layer `spec.tied` where they can be
        (`Slot.of`).
        """

    def kinds(self, config: Any, spec: LayerSpec, values: dict[str, Any]) -> dict[str, Slot]:
        """The same, each as a `Slot`."""
        slots = self.slots(config, spec, values)
        return {name: one if isinstance(one, Slot) else Slot(tuple(one)) for name, one in slots.items()}

    @abstractmethod
    def init(self, adapter: Adapter, base: Affine) -> None:
        """Fills the slots, allocated but not set, with their first values; `base` is read, never written."""

    def rebuilt(self, adapter: Adapter, base: Affine) -> dict[str, Tensor]:
        """The values of slots that are neither trained nor saved, since they follow from `base`; default
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

    def term(self, adapter: Adapter) -> Term | None:
        """All that the adapter is, where it is a sum of low rank; None where it is anything else.

        From it follow the activation view, merging in place, rows with adapters of their own, several
        adapters as one, weighted sums, and conversion to LoRA.
        """
        return None

    def fused_term(self, adapter: Adapter) -> Term | None:
        """The term that `forward` computes as one operation with the layer (`below.fused`), by default all
        that `term` says.
        """
        return self.term(adapter)

    def forward(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        """The activation view; by default the layer's own operation with the changed weights."""
        return below.op(x, self.apply(adapter, below.dense()))


def method_for(peft_type: str) -> Method:
    """The method for a `peft_type`, imported when it is first asked for.

    Raises `ConfigError` if there is none.
    """
    return cast(Method, registry.method(peft_type))


class Additive(Method):
    """Adds `scaling * delta` to the weight. Supply `term` where the change is of low rank, else `delta`."""

    def delta(self, adapter: Adapter, dtype: torch.dtype) -> Tensor:
        """The change before scaling, in the shape of the presented weight, computed in `dtype`."""
        raise NotImplementedError(f"{self.name} supplies neither term nor delta")

    def apply(self, adapter: Adapter, affine: Affine) -> Affine:
        term = self.term(adapter)
        if term is not None:
            return term.added(affine)
        dtype = torch.promote_types(affine.weight.dtype, torch.float32)
        return Affine(affine.weight.to(dtype) + adapter.scaling * self.delta(adapter, dtype), affine.bias)

    def path(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        """The change of the output before scaling."""
        term = self.term(adapter)
        if term is None:
            return below.op(x, Affine(self.delta(adapter, x.dtype), None))
        return path_of(term, adapter.spec, x, below)

    def forward(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        term = self.fused_term(adapter)
        if term is not None and (y := below.fused(x, term)) is not None:
            return y
        y, path, scaling = below(x), self.path(adapter, x, below), cast(Any, adapter.scaling)
        if isinstance(scaling, Tensor):
            return (y + scaling * path).to(y.dtype)
        # One operation: a product with a number makes a tensor of its own and keeps the number for the
        # backward pass.
        return torch.add(y, path, alpha=scaling).to(y.dtype)


def path_of(term: Term, spec: LayerSpec, x: Tensor, below: Below) -> Tensor:
    """What a term adds to a layer's output, before its scale."""
    if spec.kind is LayerKind.EMBEDDING:
        return functional.linear(below.op(x, Affine(term.down, None)), term.up)
    x = x.to(term.down.dtype)
    if not (term.dropout and below.training):
        return _through(term.down, term.up, term.shift, spec, x, below)
    dropped = len(term.down) - term.exempt
    kept = functional.dropout(x, term.dropout, True)
    y = _through(term.down[:dropped], term.up[:, :dropped], term.shift, spec, kept, below)
    return y + _through(term.down[dropped:], term.up[:, dropped:], None, spec, x, below) if term.exempt else y


def _through(
    down: Tensor, up: Tensor, shift: Tensor | None, spec: LayerSpec, x: Tensor, below: Below
) -> Tensor:
    if spec.kind not in CONVOLUTIONS:
        return functional.linear(below.op(x, Affine(down, None)), up, shift)
    # `down` has the layer's own kernel over all input channels, `up` is a convolution of width 1 in the
    # layer's groups.
    kernel = spec.shape[2:]
    inner = below.op(x, Affine(down.view(-1, spec.in_features, *kernel), None))
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
    return convolve(inner, up.reshape(*up.shape, *[1] * len(kernel)), shift, groups=spec.groups)


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
