"""bitsandbytes: `Linear8bitLt` (LLM.int8(), https://arxiv.org/abs/2208.07339) and `Linear4bit` (nf4 and fp4
of QLoRA, https://arxiv.org/abs/2305.14314, with or without double quantization).
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base
from peftrs.bases.kinds import Affine
from peftrs.bases.quantized import Quantized, twin
from peftrs.bases.workspace import Rows, filled, made
from peftrs.errors import ConfigError


class EightBit(Quantized):
    """`Linear8bitLt` that holds int8 weights, with one scale a row."""

    own = "Linear8bitLt"

    def plain_product(self, module: nn.Module) -> bool:
        """On a CPU; elsewhere the library rounds the input too."""
        return cast(Tensor, module.weight).device.type == "cpu"

    def format(self, module: nn.Module) -> str:
        return "bitsandbytes int8"

    def weight(self, module: nn.Module) -> Tensor:
        import bitsandbytes

        return cast(Tensor, bitsandbytes.functional.int8_vectorwise_dequant(*self.codes(module)))

    def codes(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """The codes, `(out, in)`, and the scales, `(out,)`, which the first forward moves from the weight to
        the layer's state.
        """
        stored: Any = module.weight
        scales = stored.SCB if stored.SCB is not None else cast(Any, module.state).SCB
        return stored.data, scales.to(stored.device)

    def multiplied(self, module: nn.Module, dtype: torch.dtype, *, reused: bool = False) -> Tensor:
        return (filled if reused else made)(self.rows(module, dtype), self.shape(module), dtype)

    def rows(self, module: nn.Module, dtype: torch.dtype) -> Rows:
        codes, scales = self.codes(module)
        scales = scales.unsqueeze(1).mul(1 / 127)
        return lambda start, stop, into: torch.mul(codes[start:stop], scales[start:stop], out=into)

    def requantized(self, module: nn.Module, affine: Affine) -> nn.Module:
        import bitsandbytes

        stored: Any = module.weight
        # The library quantizes when a weight leaves the CPU's floating point, for whatever device.
        weight = bitsandbytes.nn.Int8Params(
            affine.weight.cpu(), requires_grad=False, has_fp16_weights=False
        ).to(stored.device)
        other: Any = twin(module, {"weight": weight, "bias": _bias(module, affine)})
        other.state = copy.copy(module.state)
        other.state.reset_grads()
        return cast(nn.Module, other)


class FourBit(Quantized):
    """`Linear4bit`, blocks of 64 weights or so with one scale each, which may be quantized in turn."""

    own = "Linear4bit"
    rounds = True

    def computes_in(self, module: nn.Module, dtype: torch.dtype) -> torch.dtype:
        """The first input's dtype, unless that is float16: the layer has one of its own then, if any."""
        layer: Any = module
        set_by_input = not layer.compute_type_is_set and dtype in (torch.float32, torch.bfloat16)
        return (
            dtype if set_by_input or layer.compute_dtype is None else cast(torch.dtype, layer.compute_dtype)
        )

    def format(self, module: nn.Module) -> str:
        state = cast(Any, module.weight).quant_state
        return f"bitsandbytes {state.quant_type}{' with double quantization' if state.nested else ''}"

    def weight(self, module: nn.Module) -> Tensor:
        import bitsandbytes

        self.prepare(module)
        stored: Any = module.weight
        return cast(Tensor, bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state))

    def rows(self, module: nn.Module, dtype: torch.dtype) -> Rows | None:
        from bitsandbytes import functional

        self.prepare(module)
        stored: Any = module.weight
        state, (count, width) = stored.quant_state, self.shape(module)
        if width % state.blocksize or tuple(state.shape) != (count, width):
            return None
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        codes, scales = stored.data.view(torch.uint8).view(count, -1), scales.view(count, -1)

        def rows(start: int, stop: int, into: Tensor) -> None:
            part = functional.QuantState(
                scales[start:stop].flatten(),
                into.shape,
                state.code,
                state.blocksize,
                state.quant_type,
                state.dtype,
            )
            into.copy_(functional.dequantize_4bit(codes[start:stop].reshape(-1, 1), part))

        return rows

    def prepare(self, module: nn.Module) -> None:
        """Undoes and forbids the packing of CPUs with AVX512-BF16.

        The library packs in the first forward in eval mode. That rounds the scales to bfloat16, and a packed
        weight neither gives gradients nor is dequantized right.
        """
        layer, stored = cast(Any, module), cast(Any, module.weight)
        if getattr(stored, "quant_state", None) is None:
            stored.quant_state = layer.quant_state
        layer.support_avx512bf16_for_cpu = False
        if getattr(stored.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            stored.data, state = _convert_weight_packed_for_cpu_inverse(stored.data, stored.quant_state)
            if not state.nested:
                # The library leaves these turned round.
                state.absmax = state.absmax.T.reshape(-1).float()
            stored.quant_state = layer.quant_state = state

    def dropped(self, module: nn.Module) -> None:
        """The weight knows its layer, for what it notes there when it is quantized."""
        cast(Any, module.weight).module = None

    def requantized(self, module: nn.Module, affine: Affine) -> nn.Module:
        import bitsandbytes

        stored: Any = module.weight
        weight = bitsandbytes.nn.Params4bit(
            affine.weight.to("cpu", stored.quant_state.dtype),
            requires_grad=False,
            compress_statistics=stored.compress_statistics,
            blocksize=stored.blocksize,
            quant_type=stored.quant_type,
            quant_storage=stored.quant_storage,
        ).to(stored.device)
        other: Any = twin(module, {"weight": weight, "bias": _bias(module, affine)})
        weight.module, other.quant_state = other, weight.quant_state
        return cast(nn.Module, other)


def _bias(module: nn.Module, affine: Affine) -> nn.Parameter | None:
    held = cast("nn.Parameter | None", module.bias)
    if held is None or affine.bias is None:
        return None
    return nn.Parameter(affine.bias.to(held.dtype).detach().clone(), requires_grad=held.requires_grad)


EIGHT_BIT, FOUR_BIT = EightBit(), FourBit()


def resolve(module: nn.Module) -> Base | None:
    """The base of a quantized layer of the library; None for its embeddings, and for 8-bit layers that keep
    16-bit weights.
    """
    names = {kind.__name__ for kind in type(module).__mro__}
    if "Linear4bit" in names:
        return FOUR_BIT
    return EIGHT_BIT if "Linear8bitLt" in names and cast(Tensor, module.weight).dtype is torch.int8 else None


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A weight `(out, in)`, quantized to nf4 in blocks of 64 (`bits=4`) or int8 by rows (8) and back, in
    float32.
    """
    try:
        from bitsandbytes import functional
    except ImportError:
        raise ConfigError(
            "LoftQ quantizes by bitsandbytes, which is not installed; hint: pip install bitsandbytes"
        ) from None
    if bits == 4:
        return cast(
            Tensor,
            functional.dequantize_4bit(*functional.quantize_4bit(weight.contiguous(), quant_type="nf4")),
        ).float()
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return cast(Tensor, functional.int8_vectorwise_dequant(codes, scales)).float()
