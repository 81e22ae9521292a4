"""`y = x·Wᵀ + bias + scaling·(x ∘ mask)·Aᵀ·Bᵀ` and its gradients in plain torch operations, the low-rank part
first.

Writing the low-rank part first lets the product with the frozen weight accumulate onto it: the sum is rounded
once and no pass over the output is made for it. All matrices here are two-dimensional: `x (M, in)`, `W (out,
in)`, `A (r, in)`, `B (out, r)`, `dy (M, out)`. `u = (x ∘ mask)·Aᵀ`, `(M, r)`, is all that the backward pass
needs beyond the arguments. `scaling` is the strength of the change, divided by the share that dropout keeps.

Factors may be float32 over a narrower `x`. Then `u` is computed in float32, and `B` meets it as two narrow
halves where the narrow dtype has float32's range, so that nothing but the output is rounded to it. Factors
and `x` may be float32 over a narrower weight, as where a library's layer rounds what it is given: then only
the product with the weight is taken in the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MASKS: dict[str, Callable[[int, int, Dropout], Tensor]] = {}
"""What makes masks of so many rows and columns on other devices than the CPU, by the device's type: kernels
add themselves.
"""


class Dropout(NamedTuple):
    """Dropout whose mask follows from a seed, so that it is made again instead of kept."""

    dropped: int
    """How many of 65,536 elements."""
    seed: int | Tensor
    """Where the mask is made: a number on the CPU, on a GPU a tensor of one, which a CUDA graph can draw
    anew.
    """

    def mask(self, x: Tensor) -> Tensor:
        """Whether each element of `x (M, in)` is kept, a function of the seed and the shape alone.

        On the CPU four elements take a word of the generator: a quarter of the time of `bernoulli_`.
        """
        if x.device.type in MASKS:
            return MASKS[x.device.type](x.shape[0], x.shape[1], self)
        generator = torch.Generator().manual_seed(int(self.seed))
        count = x.numel()
        words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        return (words.view(torch.int16)[:count] >= self.dropped - 2**15).view(x.shape)


@dataclass(frozen=True)
class Unstored:
    """A frozen weight, `(out, in)`, that is computed each time a pass reads it, as from a quantized one, and
    not kept.
    """

    compute: Callable[[], Tensor]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    rounds: bool = False
    """Whether inputs of another dtype are rounded to the weight's, and the product given back in theirs."""

    requires_grad: ClassVar[bool] = False

    def to(self, dtype: torch.dtype) -> Unstored:
        """The same in another dtype."""
        return (
            self
            if dtype == self.dtype
            else replace(self, compute=lambda: self.compute().to(dtype), dtype=dtype)
        )


class Gradients(NamedTuple):
    """Of `x`, `A` and `B`, each None where it is not asked for."""

    x: Tensor | None
    down: Tensor | None
    up: Tensor | None


def low(x: Tensor, down: Tensor, dropout: Dropout | None) -> Tensor:
    """`u = (x ∘ mask)·Aᵀ`, `(M, r)`, in the dtype of `A`."""
    if dropout is not None:
        x = torch.where(dropout.mask(x), x, 0.0)
    if x.dtype != down.dtype:
        x = x.to(down.dtype)
    return x @ down.t()


def high(u: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, scaling: float) -> Tensor:
    """`y = scaling·u·Bᵀ + bias + x·Wᵀ`, `(M, out)`, in the dtype of `x`."""
    dtype = x.dtype
    if weight.dtype != dtype:
        return functional.linear(x.to(weight.dtype), weight, bias).to(dtype).addmm_(u, up.t(), alpha=scaling)
    if u.dtype != dtype:
        if dtype is not torch.bfloat16:
            product = (
                torch.addmm(bias.to(u.dtype), u, up.t(), alpha=scaling)
                if bias is not None
                else scaling * (u @ up.t())
            )
            return product.to(dtype).addmm_(x, weight.t())
        u, up = _halves(u, dtype, (0, 1, 0)), _halves(up, dtype, (0, 0, 1))
    # Written into a tensor made here: a policy of selective checkpointing may keep what `mm` returns, which
    # must not change.
    y = x.new_empty(x.shape[0], weight.shape[0])
    if bias is None:
        return torch.mm(u, up.t(), out=y).addmm_(x, weight.t(), beta=scaling)
    return torch.addmm(bias, u, up.t(), alpha=scaling, out=y).addmm_(x, weight.t())


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
    """The gradients of `x`, `A` and `B`, each in the dtype of its own, computed in that of `x`.

    Differentiable if `u` is.
    """
    need_x, need_down, need_up = needs
    wide = down.dtype
    if wide != x.dtype:
        down, up, u = down.to(x.dtype), up.to(x.dtype), u.to(x.dtype)
    # `beta=0` ignores the first argument: it lends its shape, so that the factor is applied where the product
    # accumulates.
    d_up = torch.addmm(up, dy.t(), u, beta=0, alpha=scaling) if need_up else None
    if d_up is not None and wide != x.dtype:
        d_up = d_up.to(wide)
    if not (need_x or need_down):
        return Gradients(None, None, d_up)
    mask = None if dropout is None else dropout.mask(x)
    du = dy @ up
    d_down = None
    if need_down:
        d_down = torch.addmm(
            down, du.t(), x if mask is None else torch.where(mask, x, 0.0), beta=0, alpha=scaling
        )
        if wide != x.dtype:
            d_down = d_down.to(wide)
    if not need_x:
        return Gradients(None, d_down, d_up)
    beneath = (dy.to(weight.dtype) @ weight).to(x.dtype) if weight.dtype != x.dtype else None
    if beneath is not None and mask is None:
        return Gradients(beneath.addmm_(du, down, alpha=scaling), d_down, d_up)
    dx = du @ down
    if mask is not None:
        dx = torch.where(mask, dx, 0.0)
    if beneath is not None:
        return Gradients(beneath.add_(dx, alpha=scaling), d_down, d_up)
    return Gradients(dx.addmm_(dy, weight, beta=scaling), d_down, d_up)


class Factors(NamedTuple):
    """A LoRA over a linear layer: `scaling * up @ down`, and the share of the input that it drops."""

    down: Tensor
    """`A (r, in)`"""
    up: Tensor
    """`B (out, r)`"""
    scaling: float
    dropout: float = 0.0


def joined(several: Sequence[Factors | tuple[Tensor, Tensor, float, float]]) -> Factors:
    """Several that drop nothing as one of the sum of their ranks."""
    ups = [scaling * up for _, up, scaling, _ in several]
    return Factors(torch.cat([down for down, *_ in several]), torch.cat(ups, 1), 1.0)


def composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    several: Sequence[Factors | tuple[Tensor, Tensor, float, float]],
) -> Tensor:
    """The output for `x (..., in)` in torch's own differentiable operations, with the factors of one or
    several LoRAs.

    It keeps and moves what `LoraLinear` does not, masks, copies in other dtypes and of outputs, in the fewest
    calls.
    """
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    wide = several[0][0].dtype
    if rows.dtype is not wide:
        y = functional.linear(rows, weight, bias).to(wide)
        for down, up, scaling, dropout in several:
            kept = torch.dropout(rows, dropout, True) if dropout else rows
            y = torch.addmm(y, functional.linear(kept.to(wide), down), up.t(), alpha=scaling)
        y = y.to(rows.dtype)
    elif bias is not None:
        y = bias
        for down, up, scaling, dropout in several:
            kept = torch.dropout(rows, dropout, True) if dropout else rows
            y = torch.addmm(y, functional.linear(kept, down), up.t(), alpha=scaling)
        y = torch.addmm(y, rows, weight.t())
    else:
        # In place only without gradients: with them it saves nothing, and a policy of selective checkpointing
        # may keep what the first product gave.
        accumulate = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
        (down, up, scale, dropout), *others = several
        kept = torch.dropout(rows, dropout, True) if dropout else rows
        y = accumulate(functional.linear(functional.linear(kept, down), up), rows, weight.t(), beta=scale)
        for down, up, scaling, dropout in others:
            kept = torch.dropout(rows, dropout, True) if dropout else rows
            y = accumulate(y, functional.linear(kept, down), up.t(), alpha=scaling)
    return y if x.ndim == 2 else y.view(x.shape[:-1] + y.shape[-1:])


def _halves(tensor: Tensor, dtype: torch.dtype, order: tuple[int, int, int]) -> Tensor:
    """The value rounded to `dtype` and what that lost, side by side in the order given (0 the value, 1 the
    rest).
    """
    value = tensor.to(dtype)
    parts = (value, (tensor - value).to(dtype))
    return torch.cat([parts[at] for at in order], 1)
