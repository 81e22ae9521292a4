"""A frozen linear layer and a LoRA over it as one operation with one gradient formula.

It keeps for the backward pass what it is given, by reference, and `u (M, r)`: no copy of `x` in another
dtype, no mask of dropout. `reference` states the formula in plain torch operations, `triton` the same in
kernels, `function` puts either together. Eager code runs a `torch.autograd.Function`, or the composite of
torch's own operations where that is quicker (`SMALL`), compiled code on a GPU an operator (`library`, which
says why).

A quantized weight (`Unstored`) is dequantized in each pass and let go when the product with it is taken, on a
CPU into one tensor that is reused (`bases.workspace`).

Layers that share one `x` (q, k and v; gate and up) each read it. Reading it once for all was weighed and left
out: the forward half alone would have the first layer read its siblings' parameters before their turn
(offloading hooks and shards that gather a module at a time have not brought them yet) and hand `u` on through
a cache that is keyed on the identity and version of `x`, which a compiler cannot trace and which
recomputation under checkpointing fills again without emptying. The backward half, where two thirds of those
reads are, needs one autograd node for all siblings: a node that a caller who skips, hooks or freezes one of
them does not have. With dropout, siblings have masks of their own, which one pass would have to make all.
Where a model joins the projections itself (`qkv_proj`), one layer reads `x` once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftrs.ops import is_fused
from peftrs.ops.lora_linear.function import LoraLinear, forward, has_kernels
from peftrs.ops.lora_linear.library import operator
from peftrs.ops.lora_linear.reference import Dropout, Factors, Unstored, composed, joined
from peftrs.torch_private import is_tracing, is_transformed

__all__ = [
    "Factors",
    "LoraLinear",
    "Unstored",
    "composed",
    "is_plain_small",
    "joined",
    "lora_linear",
    "unfit",
]

NARROW = (torch.bfloat16, torch.float16)
PLAIN = (Tensor, nn.Parameter)
"""Subclasses of them (sharded, quantized, fake tensors) bring operations of their own."""


is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
"""Whether `torch.export` traces, which from torch 2.7 on is told apart from compiling."""


def unfit(weight: Tensor | Unstored, down: Tensor, up: Tensor, dropout: float = 0.0) -> str | None:
    """Why `lora_linear` does not take these whatever `x` is, or None if it does."""
    if not is_fused():
        return "fused operations are turned off"
    if type(weight) not in (*PLAIN, Unstored) or type(down) not in PLAIN or type(up) not in PLAIN:
        return "its tensors are of a class with operations of its own"
    dtype = down.dtype
    if dtype != up.dtype or (
        dtype != weight.dtype and not (dtype is torch.float32 and weight.dtype in NARROW)
    ):
        return "its factors are neither in the weight's dtype nor in float32 over a narrower one"
    if weight.requires_grad:
        return "the weight beneath is trained"
    if dropout >= 1:
        return "its dropout keeps nothing"
    if dropout and weight.device.type != "cpu" and not has_kernels(weight.device):
        return "no dropout from a seed on this kind of device"
    return None


SMALL = 2**17
"""The elements of input and output together up to which, on a CPU, calls cost more than what they move:
torch's own operations are then quicker than one node of ours, which is written in Python: with dropout 1.1 to
4 times, with casts 1.1 to 1.8, with neither up to 1.1. Whether gradients are wanted must not decide: the same
bits come out with and without.
"""


def is_small(x: Tensor, weight: Tensor | Unstored) -> bool:
    """Whether `x` and the output are small in that sense."""
    out, width = weight.shape
    count = x.numel()
    return count + count // max(width, 1) * out <= SMALL


def is_plain_small(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether all are plain tensors of one dtype on a CPU, `x` and the output small, and nothing casts or
    traces them.
    """
    return (
        x.is_cpu
        and type(x) in PLAIN
        and x.dtype is down.dtype
        and unfit(weight, down, up) is None
        and is_small(x, weight)
        and not torch.is_autocast_enabled("cpu")
    )


def is_compiled(device: torch.device) -> bool:
    """Whether a compiled graph has the operator; where not, the compiler fuses the composite itself."""
    return has_kernels(device) and not is_exporting()


def lora_linear(
    x: Tensor,
    weight: Tensor | Unstored,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor | None:
    """`x·Wᵀ + bias + s·dropout(x)·Aᵀ·Bᵀ`, or None where the caller must compose it of plain operations.

    `x (..., in)`, `W (out, in)`, `A (r, in)`, `B (out, r)`. Computes in the dtype of `x`, under autocast in
    autocast's, as `functional.linear` does. The mask of dropout follows from a number drawn from torch's
    generator, and is not the one that `functional.dropout` would draw.
    """
    if is_transformed():
        return None
    compiling = torch.compiler.is_compiling()
    if compiling:
        if isinstance(weight, Unstored) or not is_compiled(x.device):
            return None
    elif is_tracing():
        return None
    if type(x) not in PLAIN or unfit(weight, down, up, dropout) is not None:
        return None
    device, dtype = "cpu" if x.is_cpu else x.device.type, x.dtype
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        if dtype is torch.float64:
            return None
        dtype = torch.get_autocast_dtype(device)
    elif dtype != weight.dtype and not (
        isinstance(weight, Unstored) and weight.rounds and dtype == down.dtype and x.is_cpu
    ):
        return None  # on a GPU it is not known to be quicker where the layer rounds its input
    trained = torch.is_grad_enabled() and (
        x.requires_grad or down.requires_grad or up.requires_grad or (bias is not None and bias.requires_grad)
    )
    if autocast:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)
    if device == "cpu" and not compiling and is_small(x, weight):
        if isinstance(weight, Unstored):
            return None
        if autocast:  # not left to autocast, which casts `x` twice, and factors again only in recomputation
            x, down, up = x.to(dtype), down.to(dtype), up.to(dtype)
        return composed(x, weight, bias, [Factors(down, up, scaling, dropout)])
    dropped = 0
    if dropout:
        dropped = min(max(round(dropout * 2**16), 1), 2**16 - 1)
        scaling = scaling / (1 - dropped / 2**16)
    if compiling and isinstance(weight, Tensor):
        return operator(x, weight, bias, down, up, scaling, dropped, drawn(x.device) if dropped else None)
    seeded = None
    if dropped:
        seeded = Dropout(dropped, drawn(x.device) if x.is_cuda else int(torch.randint(2**63 - 1, ())))
    if not trained:
        weight = weight.compute() if isinstance(weight, Unstored) else weight
        return forward(x, weight, bias, down, up, scaling, seeded)[0]
    return LoraLinear.apply(x, weight, bias, down, up, scaling, seeded)  # type: ignore[no-any-return]


def drawn(device: torch.device) -> Tensor:
    """A seed drawn where torch's own dropout would draw, so that checkpointing draws it again.

    On the device, so that neither the host waits for it nor a captured graph keeps one number.
    """
    return torch.randint(2**63 - 1, (1,), device=device)
