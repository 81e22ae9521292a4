"""The way of small inputs through one product of factors over an `nn.Linear`, where looking things up costs
more than computing.

What stays put from call to call is looked up once. What may change unseen (parameters and their dtypes,
hooks, modules, what torch is doing) is read at each call, and all that is out of the ordinary goes the long
way of `AdaptedLayer.forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from peftrs.bases.dense import Linear
from peftrs.ops import is_fused, lora_linear

if TYPE_CHECKING:
    from peftrs.core.slots import FittedAdapter

Shortcut = Callable[[Tensor], Tensor | None]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(getattr(everywhere, f"_global{name}") for name in HOOKS)


class Product(NamedTuple):
    """What an adapter is that adds `scaling * up @ down` and nothing else."""

    down: str
    """The slot of `A (r, in)`."""
    up: str
    """The slot of `B (out, r)`."""
    dropout: float
    """The share of the input that it drops in training."""


def declined(x: Tensor) -> Tensor | None:
    """Where there is no shortcut."""
    return None


def shortcut(adapter: FittedAdapter) -> Shortcut:
    """Gives the output of the adapter's layer, with it alone, for `x (..., in)`, or None where `x` must go
    the long way.
    """
    layer, product = adapter.layer, adapter.method.product(adapter)
    modules: dict[str, Any] = layer._modules
    frozen = modules["base_layer"]
    if product is None or adapter.leader is not None or layer.parallel is not None:
        return declined
    if type(layer.base) is not Linear or layer.base.obstacle(frozen) is not None:
        return declined
    kind, own, settings, name = type(frozen), frozen.__dict__, layer.__dict__, adapter.name
    hooks = (*map(own.__getitem__, HOOKS), *GLOBAL_HOOKS)
    stored: dict[str, nn.Parameter | None] = frozen._parameters
    (lower, low), (upper, high) = map(adapter.holder, product[:2])
    lowers, uppers = (modules[adapter.places[slot][0]]._modules for slot in product[:2])
    downs, ups = lower._parameters, upper._parameters
    reach = 1 + layer.spec.out_features / layer.spec.in_features

    def run(x: Tensor) -> Tensor | None:
        if (
            modules["base_layer"] is not frozen
            or lowers.get(name) is not lower
            or uppers.get(name) is not upper
        ):
            del adapter.shortcut  # it is made anew for the modules that are there now
            return None
        if any(hooks) or "forward" in own or type(frozen) is not kind or not is_fused():
            return None
        weight, bias, down, up = stored.get("weight"), stored.get("bias"), downs.get(low), ups.get(high)
        if not (
            type(x) is Tensor
            and type(weight) is type(down) is type(up) is nn.Parameter
            and down.is_cpu
            and up.is_cpu
        ):
            return None
        dtype, wide, scaling = x.dtype, down.dtype, adapter.scaling
        if weight.dtype is not dtype or (
            wide is not dtype and (wide is not torch.float32 or dtype not in lora_linear.NARROW)
        ):
            return None
        if (bias is not None and bias.dtype is not dtype) or type(scaling) is not float:
            return None
        if (
            torch._C._is_tracing()
            or torch.is_autocast_enabled("cpu")
            or x.numel() * reach > lora_linear.SMALL
        ):
            return None
        return lora_linear.composed(
            x, weight, bias, down, up, scaling, product.dropout if settings["training"] else 0.0
        )

    return run
