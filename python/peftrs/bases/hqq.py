"""HQQ: `HQQLinear`, half-quadratic quantization of 1 to 8 bits, https://mobiusml.github.io/hqq_blog/."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base
from peftrs.bases.kinds import Affine
from peftrs.bases.quantized import Quantized


class Hqq(Quantized):
    """Packed codes in `W_q`, scales and zeros beside them, the bias a plain tensor."""

    own = "HQQLinear"

    def plain_product(self, module: nn.Module) -> bool:
        """Whether the backend chosen for the library is one of those; one rounds the input."""
        return "int8" not in cast(Any, type(module)).forward.__name__

    def computes_in(self, module: nn.Module, dtype: torch.dtype) -> torch.dtype:
        return cast(torch.dtype, module.compute_dtype)

    def format(self, module: nn.Module) -> str:
        return f"hqq {cast(Any, module).meta['nbits']}-bit"

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        return cast(nn.Parameter, module.W_q), cast("nn.Parameter | None", module.bias)

    def weight(self, module: nn.Module) -> Tensor:
        return cast(Tensor, cast(Any, module).dequantize())

    def prepare(self, module: nn.Module) -> None:
        """Cuts the bias off the one that it was copied from: the library does not, and such a tensor cannot
        be copied again.
        """
        layer: Any = module
        if layer.bias is not None and not layer.bias.is_leaf:
            layer.bias = layer.bias.detach()

    def requantized(self, module: nn.Module, affine: Affine) -> nn.Module:
        layer: Any = module
        settings = copy.deepcopy(layer.quant_config)
        options = {"compute_dtype": layer.compute_dtype, "device": str(layer.W_q.device)}
        other = type(layer)(None, {**settings, "offload_meta": layer.offload_meta}, **options)
        other.quantize(affine.weight.to(layer.compute_dtype), **settings)
        other.bias = None if affine.bias is None else affine.bias.detach().to(layer.bias.dtype).clone()
        other.train(layer.training)
        return cast(nn.Module, other)

    def dtype(self, module: nn.Module) -> torch.dtype:
        return cast(torch.dtype, module.compute_dtype)


HQQ = Hqq()


def resolve(module: nn.Module) -> Base | None:
    """The base of an `HQQLinear` that was quantized."""
    return (
        HQQ
        if any(kind.__name__ == "HQQLinear" for kind in type(module).__mro__) and cast(Any, module).ready
        else None
    )
