"""A frozen linear layer and a LoRA over it as one operation with one gradient formula.

It keeps for the backward pass what it is given, by reference, and `u (M, r)`: no copy of `x` in another dtype, no mask of
dropout. The gradient is a `torch.autograd.Function` over plain torch operations, which costs less host time than autograd's own
graph of them, and far less than an opaque `torch.library` operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from peftrs.ops import is_fused
from peftrs.ops.lora_linear import reference
from peftrs.ops.lora_linear.reference import Dropout

NARROW = (torch.bfloat16, torch.float16)
PLAIN = (Tensor, nn.Parameter)
"""Subclasses of them (sharded, quantized, fake tensors) bring operations of their own."""


def unfit(weight: Tensor, down: Tensor, up: Tensor, dropout: float = 0.0) -> str | None:
    """Why `lora_linear` does not take these whatever `x` is, or None if it does."""
    if not is_fused():
        return "fused operations are turned off"
    if type(weight) not in PLAIN or type(down) not in PLAIN or type(up) not in PLAIN:
        return "its tensors are of a class with operations of its own"
    dtype = down.dtype
    if dtype != up.dtype or (dtype != weight.dtype and not (dtype is torch.float32 and weight.dtype in NARROW)):
        return "its factors are neither in the weight's dtype nor in float32 over a narrower one"
    if weight.requires_grad:
        return "the weight beneath is trained"
    if dropout and (weight.device.type != "cpu" or dropout >= 1):
        return "its dropout keeps nothing" if dropout >= 1 else "no dropout from a seed on this kind of device"
    return None


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor | None:
    """`x·Wᵀ + bias + s·dropout(x)·Aᵀ·Bᵀ`, or None where the caller must compose it of plain operations.

    `x (..., in)`, `W (out, in)`, `A (r, in)`, `B (out, r)`. Computes in the dtype of `x`, under autocast in autocast's, as
    `functional.linear` does. The mask of dropout follows from a number drawn from torch's generator, and is not the one that
    `functional.dropout` would draw.
    """
    if (
        torch.compiler.is_compiling()  # the compiler fuses the composite itself
        or type(x) not in PLAIN
        or torch._C._functorch.peek_interpreter_stack() is not None  # `torch.func` needs rules that a Function lacks
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or unfit(weight, down, up, dropout) is not None
    ):
        return None
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        if dtype is torch.float64:
            return None
        dtype = torch.get_autocast_dtype(device)
        weight = weight.to(dtype)
    elif dtype != weight.dtype:
        return None
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    seeded = None
    if dropout:
        # A number on the host, so no tensor to keep; drawn where torch's own dropout would draw, so that checkpointing restores it.
        seeded = Dropout(min(max(round(dropout * 2**16), 1), 2**16 - 1), int(torch.randint(2**63 - 1, ())))
        scaling = scaling / seeded.share
    return LoraLinear.apply(x, weight, bias, down, up, scaling, seeded)  # type: ignore[no-any-return]


class LoraLinear(torch.autograd.Function):
    """The gradients of all but the frozen weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        dropout: Dropout | None,
    ) -> Tensor:
        rows, lower, upper = x, down, up
        if x.ndim != 2:
            rows = x.reshape(-1, x.shape[-1])
        dtype = weight.dtype
        if rows.dtype != dtype:
            rows = rows.to(dtype)
        if down.dtype != dtype and torch.is_autocast_enabled(x.device.type):
            lower, upper = down.to(dtype), up.to(dtype)
        u = reference.low(rows, lower, dropout)
        y = reference.high(u, rows, weight, bias, upper, scaling)
        ctx.save_for_backward(x, weight, down, up, u if u.dtype == dtype else u.to(dtype))
        ctx.settings = scaling, dropout
        return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, u = ctx.saved_tensors
        device = x.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return LoraLinear.backward(ctx, *gradients)
        scaling, dropout = ctx.settings
        dtype, wide = weight.dtype, down.dtype
        rows, dy = x, gradients[0]
        if x.ndim != 2:
            rows, dy = rows.reshape(-1, weight.shape[1]), dy.reshape(-1, weight.shape[0])
        if x.dtype != dtype:
            rows = rows.to(dtype)
        if wide != dtype:
            down, up = down.to(dtype), up.to(dtype)
        need_x, _, need_bias, need_down, need_up, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # Someone differentiates this formula: `u` must depend on what it was made of.
            u = reference.low(rows, down, dropout)
        dx, d_down, d_up = reference.backward(dy, rows, weight, down, up, u, scaling, dropout, (need_x, need_down, need_up))
        if dx is not None and x.dtype != dtype:
            dx = dx.to(x.dtype)
        if dx is not None and x.ndim != 2:
            dx = dx.view(x.shape)
        if wide != dtype:
            d_down, d_up = (None if gradient is None else gradient.to(wide) for gradient in (d_down, d_up))
        return dx, None, dy.sum(0) if need_bias else None, d_down, d_up, None, None
