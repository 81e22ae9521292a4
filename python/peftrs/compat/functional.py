"""Functions on models that hold adapters but are no `PeftModel`: what other libraries build their own methods
from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peftrs.core import manage
from peftrs.core.dtype import NARROW, adapter_dtype
from peftrs.core.inject import activation
from peftrs.core.tree import wrappers
from peftrs.io.state import get_peft_model_state_dict, set_peft_model_state_dict
from peftrs.model.create import inject_adapter_in_model

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: Any = None,
) -> None:
    """Makes one or several adapters act and trains them alone (none with `inference_mode`)."""
    manage.set_adapter(model, adapter_name, inference_mode)


def set_requires_grad(
    model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """Sets whether adapters are trained, leaving the others as they are."""
    manage.set_requires_grad(model, adapter_names, requires_grad)


def delete_adapter(
    model: nn.Module,
    adapter_name: str,
    prefix: str = "",
    layer_cls: Any = None,
) -> list[str] | None:
    """Takes an adapter off every layer; returns the active adapters, or None if none is left."""
    manage.delete_adapter(model, adapter_name)
    return list(activation(model).active) or None


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Widens an adapter's tensors to float32 where they are of a narrower floating-point dtype."""
    for _, wrapper in wrappers(model):
        for tensor in wrapper.tensors(adapter_name):
            if tensor.dtype in NARROW:
                tensor.data = tensor.data.to(adapter_dtype(tensor, autocast_adapter_dtype))
