"""Intel Neural Compressor: `PatchedLinear`, FP8 weights `(in, out)` with a scale, and inputs that are
quantized as they come.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base
from peftrs.bases.quantized import Readable


class Inc(Readable):
    """Measuring layers hold their weight as it was; quantized ones transposed, and dequantize it by a
    function or a scale.
    """

    def format(self, module: nn.Module) -> str:
        return f"neural-compressor {str(cast(Tensor, module.weight).dtype).removeprefix('torch.')}"

    def weight(self, module: nn.Module) -> Tensor:
        layer: Any = module
        stored = cast(Tensor, layer.weight)
        if not quantized(module):
            return stored
        if getattr(layer, "use_qdq", False):
            return cast(Tensor, layer.dequant_weights(stored)).mT
        if getattr(layer, "fake_quant", False):
            return cast(Tensor, layer.qdq_weights(stored)).mT
        wide = stored.to(self.dtype(module))
        return (wide * torch.as_tensor(layer.scale_weight, dtype=wide.dtype, device=wide.device)).mT

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        stored = tuple(cast(Tensor, module.weight).shape)
        return stored[::-1] if quantized(module) else stored

    def dtype(self, module: nn.Module) -> torch.dtype:
        return cast(torch.dtype, getattr(module, "hp_dtype", torch.bfloat16))

    def differentiable(self, module: nn.Module) -> bool:
        return False


INC = Inc()


def quantized(module: nn.Module) -> bool:
    """Whether the layer's weight is quantized, and so transposed, and not only measured."""
    return any(hasattr(module, name) for name in ("matmul_fp8", "dequant_weights", "qdq_weights"))


def resolve(module: nn.Module) -> Base | None:
    """The base of a `PatchedLinear`."""
    return INC if any(kind.__name__ == "PatchedLinear" for kind in type(module).__mro__) else None
