"""How a frozen layer presents itself to the core: its weight as `(out, in, ...)`, and its own operation.

A base holds no tensors: one instance serves every layer of its kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from peftrs.bases import offload, sharded
from peftrs.bases.kinds import Affine, LayerKind


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

    @abstractmethod
    def op(
        self, module: nn.Module, x: Any, affine: Affine, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """The layer's own operation with another affine map. `x` is the first positional input."""


def called(module: nn.Module, forward: Callable[..., Any]) -> str | None:
    """Why calling the module does more than run this forward of its class, or None if that is all."""
    if type(module).forward is not forward or "forward" in module.__dict__:
        return "the layer beneath has a forward of its own"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    ):
        return "the layer beneath has hooks"
    return None


def as_dtype(affine: Affine, dtype: torch.dtype) -> Affine:
    """The map in the dtype that the layer's operation computes in."""
    bias = affine.bias
    return Affine(affine.weight.to(dtype), None if bias is None else bias.to(dtype))
