"""LoRA-FA: the first factor stays as it is, and the second follows the gradient that the whole weight would
have.

Zhang et al. 2023, https://arxiv.org/abs/2308.03303, with the projected gradient `g_B (A Aᵀ)⁻¹ / s²` of Wang
et al. 2024, https://arxiv.org/abs/2407.05000; steps are AdamW's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftrs.config import PeftConfig
from peftrs.core.slots import FittedAdapter
from peftrs.errors import AdapterError, PeftrsWarning
from peftrs.train.pairs import inverse, pairs

DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW with weight decay after the step, which projects the gradients of second factors first.

    `projections` says how: for a second factor `B (out, r)`, the first one `A (r, in)` and the adapter, whose
    scaling counts as it is at each step. Gradients are projected in float32 or wider.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        faults = [f"lr {lr} is below 0"] if lr < 0 else []
        faults += [f"beta {beta} is not in [0, 1)" for beta in betas if not 0 <= beta < 1]
        faults += [f"eps {eps} is below 0"] if eps < 0 else []
        if faults:
            raise ValueError("; ".join(faults))
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)
        self.projections: dict[nn.Parameter, tuple[nn.Parameter, FittedAdapter]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure` computes the loss and the gradients anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, self._projected(parameter), group)
        return loss

    def _projected(self, parameter: nn.Parameter) -> Tensor:
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        if parameter not in self.projections:
            return gradient
        down, fitted = self.projections[parameter]
        wide = torch.promote_types(down.dtype, torch.float32)
        a = down.to(wide)
        projected: Tensor = (gradient.to(wide) @ inverse(a @ a.mT, DAMPING) / fitted.scaling**2).to(
            gradient.dtype
        )
        return projected

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state |= {
                "step": 0,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """A LoRA-FA optimizer over all that the model trains; the first factors are frozen.

    `r` and `lora_alpha` are there for callers of PEFT: each layer's own scaling counts, whatever patterns
    gave it. `use_rslora` must be what the adapters' configs say, else `AdapterError`.
    """
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
    if use_rslora is not None:
        others = [name for name, config in configs.items() if config.use_rslora != use_rslora]
        if others:
            raise AdapterError(
                f"use_rslora is {use_rslora}, but the configs of {others} say otherwise; leave it out"
            )
        warnings.warn(
            "`use_rslora` follows from the adapters' configs; leave it out", PeftrsWarning, stacklevel=2
        )
    found = list(pairs(model, tables=True))
    for _, down, _ in found:
        down.requires_grad_(False)
    optimizer = LoraFAOptimizer(
        [one for one in model.parameters() if one.requires_grad], lr=lr, weight_decay=weight_decay
    )
    for fitted, down, up in found:
        if up.requires_grad:
            optimizer.projections[up] = down, fitted
    return optimizer
