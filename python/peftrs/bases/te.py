"""Transformer Engine: `Linear`, and `LayerNormLinear` and `LayerNormMLP`, which do more than one affine map
to their input.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base
from peftrs.bases.quantized import Readable
from peftrs.errors import MergeError


class TransformerEngine(Readable):
    """The weight is a 16-bit parameter or a quantized tensor; it may be split by rows into several of
    either.
    """

    def format(self, module: nn.Module) -> str:
        return f"transformer-engine {type(module).__name__} {type(self.parameters(module)[0]).__name__}"

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        layer: Any = module
        biases = [getattr(layer, name) for name in getattr(layer, "bias_names", ())] if layer.use_bias else []
        bias = biases[0] if len(biases) == 1 else (torch.cat([*biases]) if biases else None)
        return getattr(layer, layer.weight_names[0]), cast("nn.Parameter | None", bias)

    def weight(self, module: nn.Module) -> Tensor:
        parts: list[Any] = [getattr(module, name) for name in cast("list[str]", module.weight_names)]
        dense = [part.dequantize() if hasattr(part, "_quantizer") else part for part in parts]
        return cast(Tensor, dense[0] if len(dense) == 1 else torch.cat(dense))

    def dtype(self, module: nn.Module) -> torch.dtype:
        return self.parameters(module)[0].dtype


class Composite(TransformerEngine):
    """A norm and what follows it in one module: an adapter runs beside it, over its input before the norm."""

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        return next(module.parameters()), None

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        layer: Any = module
        if hasattr(layer, "out_features"):
            return layer.out_features, layer.in_features
        width = layer.fc2_weight.shape[0]
        return width, width

    def weight(self, module: nn.Module) -> Tensor:
        raise MergeError(
            f"a {type(module).__name__} of Transformer Engine is no affine map: a norm comes first"
        )


TE, COMPOSITE = TransformerEngine(), Composite()


def resolve(module: nn.Module) -> Base | None:
    """The base of a linear layer of the library, or of one that holds some."""
    name = type(module).__name__
    if name in ("LayerNormLinear", "LayerNormMLP"):
        return COMPOSITE
    return TE if name == "Linear" and type(module).__module__.startswith("transformer_engine") else None
