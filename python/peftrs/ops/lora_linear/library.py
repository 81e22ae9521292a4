"""`lora_linear` as operators of `torch.library`, for graphs: `peftrs::lora_linear` and
`peftrs::lora_linear_backward`.

An opaque operator costs more host time than a `torch.autograd.Function` (95 and 215 µs against 37 and 105,
forward and with the backward pass), so eager code never calls these. In a compiled graph that cost is gone,
and on a GPU the operator is what keeps the plan: a compiler given the composite copies the low-rank part
before the product accumulates onto it, keeps or makes again what `u` replaces, and reads `x` and `dy` once
for each product. On the CPU a compiled layer takes as long with it as with the composite, to 3 % (512 tokens,
576 to 576 and to 1536, float32 and autocast, torch 2.15), so that the composite, which more tools read,
stays.

Both operators are one kernel for every device, which picks its passes as eager code does, and functions of
their arguments alone. The shapes that tracing needs are given as kernels for meta tensors: `register_fake`
looks for the source of what it is given, which took a quarter of the time of our imports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrs.ops.lora_linear import function, reference
from peftrs.ops.lora_linear.reference import Dropout, Gradients

FORWARD, BACKWARD = "peftrs::lora_linear", "peftrs::lora_linear_backward"
Needs = tuple[bool, bool, bool]

torch.library.define(
    FORWARD,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, float scaling, int dropped, Tensor?"
    " seed) -> (Tensor y, Tensor u)",
)
torch.library.define(
    BACKWARD,
    "(Tensor dy, Tensor x, Tensor weight, Tensor down, Tensor up, Tensor u, float scaling, int dropped,"
    " Tensor? seed, bool[3] needs) -> Tensor[]",
)


def _dropout(dropped: int, seed: Tensor | None) -> Dropout | None:
    return None if seed is None else Dropout(dropped, seed)


@torch.library.impl(FORWARD, "default")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    dropped: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return function.forward(x, weight, bias, down, up, scaling, _dropout(dropped, seed))


@torch.library.impl(FORWARD, "Meta")
def _forward_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    dropped: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return weight.new_empty(*x.shape[:-1], weight.shape[0]), down.new_empty(rows, down.shape[0])


@torch.library.impl(BACKWARD, "default")
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    u: Tensor,
    scaling: float,
    dropped: int,
    seed: Tensor | None,
    needs: Needs,
) -> list[Tensor]:
    """The gradients that are needed, in the order of `Gradients`."""
    found = function.backward(dy, x, weight, down, up, u, scaling, _dropout(dropped, seed), needs)
    return [one for one in found if one is not None]


@torch.library.impl(BACKWARD, "Meta")
def _backward_shapes(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    u: Tensor,
    scaling: float,
    dropped: int,
    seed: Tensor | None,
    needs: Needs,
) -> list[Tensor]:
    return [
        torch.empty_like(one, memory_format=torch.contiguous_format)
        for one, need in zip((x, down, up), needs, strict=True)
        if need
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, down, up, scaling, dropped, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, down, up, output[1], seed)
    ctx.settings = scaling, dropped


def _gradients(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, down, up, u, seed = ctx.saved_tensors
    scaling, dropped = ctx.settings
    need_x, _, need_bias, need_down, need_up, *_ = ctx.needs_input_grad
    needs = need_x, need_down, need_up
    if torch.is_grad_enabled():
        gradients = function.backward(dy, x, weight, down, up, u, scaling, _dropout(dropped, seed), needs)
    else:
        made = iter(
            torch.ops.peftrs.lora_linear_backward(dy, x, weight, down, up, u, scaling, dropped, seed, needs)
        )
        gradients = Gradients(*(next(made) if need else None for need in needs))
    d_bias = dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None
    return gradients.x, None, d_bias, gradients.down, gradients.up, None, None, None


torch.library.register_autograd(FORWARD, _gradients, setup_context=_setup)


@torch.library.impl(FORWARD, ("AutocastCPU", "AutocastCUDA"))
def _autocast(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    dropped: int,
    seed: Tensor | None,
) -> Any:
    """As `functional.linear`: everything in autocast's dtype, but for factors that the passes take as they
    are.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if function.passes(x, down) is reference:
        down, up = down.to(dtype), up.to(dtype)
    with torch.autocast(device, enabled=False):
        return torch.ops.peftrs.lora_linear(x, weight, bias, down, up, scaling, dropped, seed)


def operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    dropped: int,
    seed: Tensor | None,
) -> Tensor:
    """The output of `peftrs::lora_linear`; a seed makes it drop `dropped` of 65,536 elements."""
    y, _ = torch.ops.peftrs.lora_linear(x, weight, bias, down, up, scaling, dropped, seed)
    return y  # type: ignore[no-any-return]
