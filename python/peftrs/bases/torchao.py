"""torchao: an `nn.Linear` whose weight is a quantized tensor (int8, int4 and other widths, float8), alone or
with its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base
from peftrs.bases.kinds import Affine
from peftrs.bases.quantized import IN_A_DTYPE, Quantized, twin
from peftrs.bases.workspace import Rows
from peftrs.errors import MergeError


class Torchao(Quantized):
    """The tensor says how it was quantized, so that it can be done again; tensors of a kind that `AGAIN`
    lacks are read only.
    """

    own = "Linear"

    def plain_product(self, module: nn.Module) -> bool:
        return self.differentiable(module)

    def computes_in(self, module: nn.Module, dtype: torch.dtype) -> torch.dtype:
        return cast(Tensor, module.weight).dtype

    def format(self, module: nn.Module) -> str:
        weight: Any = module.weight
        stored = getattr(weight, "target_dtype", None) or getattr(getattr(weight, "qdata", None), "dtype", "")
        return f"torchao {type(weight).__name__} {str(stored).removeprefix('torch.')}".rstrip()

    def weight(self, module: nn.Module) -> Tensor:
        try:
            return cast(Tensor, cast(Any, module.weight).dequantize())
        except NotImplementedError:
            return super().weight(module)

    def rows(self, module: nn.Module, dtype: torch.dtype) -> Rows | None:
        """Of int8 with a scale a row, by the tensor's own formula: slices of it take longer, and there are
        none in inference.
        """
        stored: Any = module.weight
        if type(stored).__name__ != "Int8Tensor" or list(stored.block_size) != [1, stored.shape[1]]:
            return None
        codes, scales, zero = stored.qdata, stored.scale.view(-1, 1), stored.zero_point
        if zero is None or not zero.any():
            return lambda start, stop, into: torch.mul(codes[start:stop], scales[start:stop], out=into)
        zeros = zero.view(-1, 1).to(dtype)
        return lambda start, stop, into: torch.mul(
            codes[start:stop].to(dtype) - zeros[start:stop], scales[start:stop], out=into
        )

    def differentiable(self, module: nn.Module) -> bool:
        """Quantized inputs are rounded, through which the library passes no gradient."""
        return all(
            getattr(module.weight, name, None) is None
            for name in ("act_quant_kwargs", "activation_quantization")
        )

    def requantized(self, module: nn.Module, affine: Affine) -> nn.Module:
        stored: Any = module.weight
        again = AGAIN.get(type(stored).__name__)
        if again is None:
            raise MergeError(
                f"torchao's {type(stored).__name__} is not written again here; hint: {IN_A_DTYPE}"
            )
        bias = (
            None if affine.bias is None else affine.bias.detach().to(cast(Tensor, module.bias).dtype).clone()
        )
        return twin(
            module, {"weight": again(stored, affine.weight.to(stored.dtype).contiguous()), "bias": bias}
        )


def _granularity(stored: Any) -> Any:
    """How many weights share a scale, as torchao says it: from the block that does."""
    kinds = import_module("torchao.quantization.granularity")
    rows, columns = stored.block_size
    if (rows, columns) == tuple(stored.shape):
        return kinds.PerTensor()
    return kinds.PerRow() if columns == stored.shape[1] else kinds.PerGroup(columns)


def _mapping(zero_point: Tensor | None) -> Any:
    kinds = import_module("torchao.quantization.quant_primitives").MappingType
    return kinds.SYMMETRIC if zero_point is None or not bool(zero_point.any()) else kinds.ASYMMETRIC


def _int8(stored: Any, weight: Tensor) -> Tensor:
    names = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range")
    options = {name: getattr(stored, name) for name in names}
    return cast(
        Tensor, type(stored).from_hp(weight, _granularity(stored), _mapping(stored.zero_point), **options)
    )


def _narrow(stored: Any, weight: Tensor) -> Tensor:
    options = {
        "mapping_type": _mapping(stored.zero_point),
        "activation_quantization": stored.activation_quantization,
    }
    return cast(
        Tensor, type(stored).from_hp(weight, tuple(stored.block_size), stored.target_dtype, **options)
    )


def _float8(stored: Any, weight: Tensor) -> Tensor:
    options = {name: getattr(stored, name) for name in ("mm_config", "kernel_preference", "act_quant_kwargs")}
    return cast(Tensor, type(stored).from_hp(weight, stored.qdata.dtype, _granularity(stored), **options))


def _packed(stored: Any, weight: Tensor) -> Tensor:
    return cast(Tensor, type(stored).from_hp(weight, list(stored.block_size)))


AGAIN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _narrow,
    "Float8Tensor": _float8,
    "Int4Tensor": _packed,
    "Int4TilePackedTo4dTensor": _packed,
    "Int4PlainInt32Tensor": _packed,
}
"""How a weight becomes a tensor of the same kind and settings as one that is stored."""

TORCHAO = Torchao()


def resolve(module: nn.Module) -> Base | None:
    """The base of an `nn.Linear` whose weight is a tensor of torchao."""
    kinds = type(module._parameters.get("weight")).__mro__
    return (
        TORCHAO
        if isinstance(module, nn.Linear) and any(kind.__module__.startswith("torchao.") for kind in kinds)
        else None
    )
