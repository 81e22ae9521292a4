"""What the passes of `lora_linear` are put together to, forward and backward, and the same as a
`torch.autograd.Function`.

Where Triton's kernels fit they are the passes, elsewhere plain torch operations (`reference`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from peftrs.ops.lora_linear import reference
from peftrs.ops.lora_linear.reference import Dropout, Gradients, Unstored
from peftrs.torch_private import constant_under_compilation


@cache
def kernels() -> Any:
    """The module of Triton's passes, or None where there is no Triton."""
    try:
        from peftrs.ops.lora_linear import triton
    except ImportError:
        return None
    return triton


@constant_under_compilation
def has_kernels(device: torch.device) -> bool:
    """Whether Triton's passes run on a device."""
    return device.type == "cuda" and kernels() is not None and kernels().is_available(device)


def passes(x: Tensor, down: Tensor) -> Any:
    """The module whose passes compute these."""
    return kernels() if x.is_cuda and kernels() is not None and kernels().fits(x, down) else reference


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """The output, in the dtype of `x` or under autocast of the weight, and `u (M, r)`."""
    rows, dtype = x, weight.dtype
    if x.ndim != 2:
        rows = x.reshape(-1, x.shape[-1])
    autocast = (x.dtype != dtype or down.dtype != dtype) and torch.is_autocast_enabled(x.device.type)
    if autocast and x.dtype != dtype:
        rows = rows.to(dtype)
    chosen = passes(rows, down)
    if autocast and chosen is reference:
        down, up = down.to(dtype), up.to(dtype)
    u = chosen.low(rows, down, dropout)
    y = chosen.high(u, rows, weight, bias, up, scaling)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1]), u


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    u: Tensor,
    scaling: float,
    dropout: Dropout | None,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """The gradients of `x`, `A` and `B`, each in the dtype and shape of its own.

    Differentiable where gradients are on.
    """
    rows = x
    if x.ndim != 2:
        rows, dy = x.reshape(-1, weight.shape[1]), dy.reshape(-1, weight.shape[0])
    if rows.dtype != dy.dtype:
        rows = rows.to(dy.dtype)
    chosen = passes(rows, down)
    if torch.is_grad_enabled():
        # Someone differentiates this formula: `u` must depend on what it was made of.
        chosen = reference
        u = reference.low(rows, down, dropout)
    dx, d_down, d_up = chosen.backward(dy, rows, weight, down, up, u, scaling, dropout, needs)
    if dx is not None and dx.dtype != x.dtype:
        dx = dx.to(x.dtype)
    if dx is not None and x.ndim != 2:
        dx = dx.view(x.shape)
    return Gradients(dx, d_down, d_up)


class LoraLinear(torch.autograd.Function):
    """The gradients of all but the frozen weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | Unstored,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        dropout: Dropout | None,
    ) -> Tensor:
        y, u = forward(
            x, weight.compute() if isinstance(weight, Unstored) else weight, bias, down, up, scaling, dropout
        )
        if u.dtype != y.dtype and not u.is_cuda:  # there the kernels round it as they read it
            u = u.to(y.dtype)
        stored, ctx.unstored = (None, weight) if isinstance(weight, Unstored) else (weight, None)
        ctx.save_for_backward(x, stored, down, up, u)
        ctx.settings = scaling, dropout
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, u = ctx.saved_tensors
        device = "cpu" if x.is_cpu else x.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return LoraLinear.backward(ctx, *gradients)
        if weight is None:
            weight = ctx.unstored.compute()
        need_x, _, need_bias, need_down, need_up, *_ = ctx.needs_input_grad
        dy, needs = gradients[0], (need_x, need_down, need_up)
        scaling, dropout = ctx.settings
        dx, d_down, d_up = backward(dy, x, weight, down, up, u, scaling, dropout, needs)
        d_bias = dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None
        return dx, None, d_bias, d_down, d_up, None, None
