"""Riemannian preconditioning: each factor's gradient is measured by the other factor, so that steps do not
depend on their scale.

Zhang and Pilanci 2024, https://arxiv.org/abs/2402.02347: `g_A ← (BᵀB + reg·I)⁻¹ g_A`, `g_B ← g_B (A Aᵀ +
reg·I)⁻¹`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from peftrs.train.pairs import inverse, pairs


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer of a subclass of the class given, which changes the gradients of LoRA's factors before
    each step.

    `reg` is added to the diagonals before they are inverted. What is trained beside LoRA's matrices
    (embeddings, magnitudes, heads) takes plain steps. Raises `TypeError` for what is no optimizer class,
    `ValueError` where no LoRA is trained or the class needs a closure.
    """
    if not issubclass(optimizer_cls, Optimizer):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}")
    trained = [
        (down, up) for _, down, up in pairs(model, tables=False) if down.requires_grad and up.requires_grad
    ]
    if not trained:
        raise ValueError(
            "create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs on the"
            " model"
        )
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{optimizer_cls.__name__} requires a closure, which computes gradients anew within a step"
        )

    class Riemannian(optimizer_cls):  # type: ignore[misc, valid-type]
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            if closure is not None:
                raise ValueError(
                    "a Riemannian optimizer does not support closures, which would compute the gradients anew"
                )
            precondition(trained, reg)
            return super().step()

    Riemannian.__name__ = f"Riemannian{optimizer_cls.__name__}"
    made: Optimizer = Riemannian([one for one in model.parameters() if one.requires_grad], lr=lr, **kwargs)
    return made


@torch.no_grad()
def precondition(factors: list[tuple[nn.Parameter, nn.Parameter]], reg: float) -> None:
    """Changes the gradients of pairs `A (r, in)`, `B (out, r)` in place, computing in float32 or wider."""
    for down, up in factors:
        dtype = torch.promote_types(down.dtype, torch.float32)
        a, b = down.to(dtype), up.to(dtype)
        if down.grad is not None:
            down.grad.copy_(inverse(b.mT @ b, reg) @ down.grad.to(dtype))
        if up.grad is not None:
            up.grad.copy_(up.grad.to(dtype) @ inverse(a @ a.mT, reg))
