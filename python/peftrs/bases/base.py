"""How a frozen layer presents itself to the core: its weight as `(out, in, ...)`, and its own operation.

A base holds no tensors: one instance serves every layer of its kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases import offload, sharded, store
from peftrs.bases.kinds import Affine, LayerKind
from peftrs.bases.store import Change, Layout, Undo, Written
from peftrs.torch_private import hooks_of


class Base(ABC):
    """A kind of frozen layer."""

    kind: LayerKind
    transposed = False
    """Whether the layer stores `(in, out)`, so that the presented weight is a transposed view of it."""
    first = "input"
    """The name of its first argument."""
    opaque = False
    """Whether the owner's forward reads the weight by itself, so that only the weight view can change it."""
    quantized = False
    """Whether the layer stores its weight in another form than numbers of a floating-point dtype; see
    `bases.quantized`.
    """

    @abstractmethod
    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        """The stored weight and bias."""

    def prepare(self, module: nn.Module) -> None:
        """Makes the layer one that gradients pass through; most are."""
        return

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """The shape of the presented weight, wherever its values are."""
        *stack, rows, columns = sharded.shape(self.parameters(module)[0])
        return (*stack, columns, rows) if self.transposed else (*stack, rows, columns)

    def groups(self, module: nn.Module) -> int:
        """How many groups the layer's channels fall into."""
        return 1

    def dense(self, module: nn.Module) -> Affine:
        """The layer as an affine map: views of what is stored, to be read, never written."""
        weight: Tensor
        bias: Tensor | None
        weight, bias = self.parameters(module)
        if weight.is_meta:
            weight, bias = (
                offload.fetched(module, weight),
                None if bias is None else offload.fetched(module, bias),
            )
        return Affine(weight.mT if self.transposed else weight, bias)

    def obstacle(self, module: nn.Module) -> str | None:
        """Why calling the layer does more than apply its affine map to one input, or None if that is all."""
        return "its kind of layer has no fused form"

    @property
    def layout(self) -> Layout:
        """How the weight is stored."""
        return Layout(self.transposed, self.kind is LayerKind.PARAMETER)

    def stored(self, module: nn.Module) -> list[nn.Parameter]:
        """The stored weight and, if there is one, bias."""
        return [parameter for parameter in self.parameters(module) if parameter is not None]

    def check(
        self, module: nn.Module, change: Change, *, keep: bool, dtype: torch.dtype | None = None
    ) -> None:
        """Raises `MergeError` for what can be known of storing a change before a weight is touched."""
        store.check(self.stored(module), change, self.layout, keep=keep, dtype=dtype)

    def store(self, module: nn.Module, change: Change, keep: Collection[int]) -> tuple[nn.Module, Undo]:
        """Stores a changed map, and gives the layer that has it now and what takes it out again. Raises
        `MergeError`.

        `keep` are the positions in `stored` of what is to be restored later.
        """
        return module, store.write(self.stored(module), change, self.layout, keep)

    def restore(self, module: nn.Module, undo: Undo) -> tuple[nn.Module, bool]:
        """The layer as it was before `store`, and whether that is so to the bit."""
        return module, cast(Written, undo).restore(self.stored(module))

    def original(self, module: nn.Module, undo: Undo | None) -> list[Tensor]:
        """The weight and, if there is one, bias as they are stored without what was merged."""
        stored = self.stored(module)
        return (
            list(stored)
            if undo is None
            else [cast(Written, undo).original(stored, at) for at in range(len(stored))]
        )

    @abstractmethod
    def op(
        self, module: nn.Module, x: Any, affine: Affine, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """The layer's own operation with another affine map. `x` is the first positional input."""


def called(module: nn.Module, forward: Callable[..., Any]) -> str | None:
    """Why calling the module does more than run this forward of its class, or None if that is all."""
    if type(module).forward is not forward or "forward" in module.__dict__:
        return "the layer beneath has a forward of its own"
    if any(hooks_of(module)):
        return "the layer beneath has hooks"
    return None


def as_dtype(affine: Affine, dtype: torch.dtype) -> Affine:
    """The map in the dtype that the layer's operation computes in."""
    bias = affine.bias
    return Affine(affine.weight.to(dtype), None if bias is None else bias.to(dtype))
