"""The fold that both forward and merging are: adapters over a frozen layer, the innermost first.

Active adapters `[a, b]`: of two that act on the input, `a` meets it first, being the outermost; of two that
act on the output, `a` acts first, being the innermost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base
from peftrs.bases.kinds import Affine
from peftrs.bases.quantized import Quantized
from peftrs.core.slots import FittedAdapter
from peftrs.ops.lora_linear.reference import Unstored

if TYPE_CHECKING:
    from peftrs.core.layer import AdaptedLayer

Chain = tuple[FittedAdapter, ...]


class Beneath:
    """What lies beneath an adapter of a chain, for one call of the layer."""

    __slots__ = ("chain", "layer", "options", "rest")

    def __init__(
        self, layer: AdaptedLayer, chain: Chain, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.layer = layer
        self.chain = chain
        self.rest = rest
        self.options = options

    @property
    def training(self) -> bool:
        return self.layer.training

    @property
    def module(self) -> nn.Module:
        return self.layer.get_base_layer()

    @property
    def base(self) -> Base:
        return self.layer.base

    def __call__(self, x: Tensor) -> Tensor:
        if not self.chain:
            y = cast(Tensor, self.layer.base_layer(x, *self.rest, **self.options))
            return y if self.layer.parallel is None else self.layer.parallel.joined(y)
        outermost = self.chain[-1]
        bare = Beneath(self.layer, (), self.rest, self.options)
        if bare.takes(self.chain):
            joined = outermost.method.together(self.chain, x, bare)
            if joined is not None:
                return joined
        return outermost.method.forward(
            outermost, x, Beneath(self.layer, self.chain[:-1], self.rest, self.options)
        )

    def dense(self) -> Affine:
        affine = self.layer.dense()
        return fold(self.chain, affine) if self.chain else affine

    def weight(self, dtype: torch.dtype) -> tuple[Tensor | Unstored, Tensor | None]:
        if (
            self.chain or not self.layer.base.quantized
        ):  # a flag: abstract classes take long to tell instances
            return self.dense()
        base = cast(Quantized, self.layer.base)
        module = self.layer.base_layer
        stored, bias = base.parameters(module)
        computed = base.computes_in(module, dtype)

        def compute() -> Tensor:
            # With gradients on, someone differentiates the gradients, and keeps the weight for that.
            reused = not torch.is_grad_enabled()
            with torch.no_grad():
                return base.multiplied(module, computed, reused=reused)

        return Unstored(compute, torch.Size(base.shape(module)), computed, stored.device, base.rounds), bias

    def obstacle(self) -> str | None:
        if self.chain:
            return "another adapter lies beneath"
        if self.rest or self.options:
            return "the layer beneath takes more than one input"
        layer = self.layer
        return layer.base.obstacle(layer._modules["base_layer"])  # type: ignore[arg-type]

    def takes(self, chain: Chain) -> bool:
        """Whether several adapters are to run as one operation with what is here."""
        if (
            len(chain) < 2
            or self.layer.parallel is not None
            or any(one.method is not chain[0].method for one in chain)
        ):
            return False
        return chain[0].method.apart(chain, self) is None

    def op(self, x: Tensor, affine: Affine) -> Tensor:
        return cast(Tensor, self.layer.base.op(self.layer.base_layer, x, affine, self.rest, self.options))


def fold(chain: Chain, affine: Affine) -> Affine:
    """The affine map under the chain, innermost first."""
    for adapter in chain:
        affine = adapter.method.apply(adapter, affine)
    return affine
