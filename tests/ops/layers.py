"""One adapted linear layer, made alike with either library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def layer(
    library: Any, dtype: torch.dtype, width: int, out: int, *, bias: bool = False, ratio: float = 1.0,
    base: nn.Module | None = None, **settings: Any,
) -> nn.Module:  # fmt: skip
    """A frozen linear layer, with a LoRA whose output is `ratio` times the layer's own where a library is
    given.
    """
    torch.manual_seed(0)
    frozen = (nn.Linear(width, out, bias=bias).to(dtype) if base is None else base).requires_grad_(False)
    if library is None:
        return frozen
    config = library.LoraConfig(target_modules=["0"], **{"r": 16, "lora_alpha": 16, **settings})
    adapted = library.get_peft_model(nn.Sequential(frozen), config).base_model.model[0].train()
    down, up = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    torch.manual_seed(1)  # what follows is the same for either library
    with torch.no_grad():
        down.copy_(torch.randn(down.shape) / width**0.5)
        up.copy_(torch.randn(up.shape) * ratio * (3 * down.shape[0]) ** -0.5)
    return adapted


def step(module: nn.Module, x: Tensor, *, autocast: bool = False) -> Tensor:
    """One forward and backward pass."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    y.backward(torch.ones_like(y))
    return y


def tensors(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """`W`, `A` and `B` of a layer of either library, in float64."""
    held = (module.base_layer.weight, module.lora_A["default"].weight, module.lora_B["default"].weight)
    return tuple(one.detach().double() for one in held)
