"""Small helpers around models with adapters: signatures, strength for a while, what is an adapter's
folder.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

from torch import nn

from peftrs.config import PeftConfig
from peftrs.core.tree import adapted_layers
from peftrs.errors import AdapterError, PeftrsError

__all__ = [
    "DoraCaching",
    "check_if_peft_model",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]

CATCHING = (["args", "kwargs"], ["kwargs"])
"""The parameters of methods that pass on whatever they are given."""


def update_forward_signature(model: nn.Module) -> None:
    """Makes `forward` of a `PeftModel` show the signature and documentation of the model inside."""
    _show(model, "forward")


def update_generate_signature(model: nn.Module) -> None:
    """Makes `generate` of a `PeftModel` show the signature and documentation of the model inside."""
    _show(model, "generate")


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Does so for "forward", "generate" or "all". Raises `ValueError` for any other method."""
    if method not in ("forward", "generate", "all"):
        raise ValueError(
            f"method {method} is not supported please choose one of ['forward', 'generate', 'all']"
        )
    for name in ("forward", "generate") if method == "all" else (method,):
        _show(model, name)


def _show(model: nn.Module, name: str) -> None:
    shown = getattr(type(cast(Any, model).get_base_model()), name, None)
    if shown is None or list(inspect.signature(getattr(model, name)).parameters) not in CATCHING:
        return
    passed_on = getattr(type(model), name)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return passed_on(self, *args, **kwargs)

    method.__name__, method.__doc__, method.__annotations__ = name, shown.__doc__, dict(shown.__annotations__)
    method.__signature__ = inspect.signature(shown)  # type: ignore[attr-defined]
    setattr(model, name, MethodType(method, model))


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a local folder or repository holds an adapter that peftrs can read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (PeftrsError, OSError, ValueError):
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside the `with`, every adapter that has a scaling is `multiplier` times as strong.

    With a multiplier in [0, 1] that is WiSE-FT (https://arxiv.org/abs/2109.01903). Raises `TypeError` for
    what is no number and `AdapterError` where no adapter has a scaling, or where one is merged, whose
    strength is in the weights already.
    """
    if not isinstance(multiplier, int | float):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = list(adapted_layers(model))
    scaled = [
        one for layer in layers for one in layer.adapters.values() if "scaling" in one.method.attributes
    ]
    if not scaled:
        raise AdapterError("no adapter of the model has a scaling; hint: LoRA adapters do")
    if merged := next((layer for layer in layers if layer.merged), None):
        raise AdapterError(f"{merged.spec.name}: adapters are merged; hint: unmerge them first")
    before = [float(one.scaling) for one in scaled]
    try:
        for one in scaled:
            one.rescale(one.scaling * multiplier)
        yield
    finally:
        for one, scaling in zip(scaled, before, strict=True):
            one.rescale(scaling)


class DoraCaching:
    """A switch, as a context manager or called, for code that turns PEFT's cache of DoRA on or off. It
    changes nothing here.

    The norm of a DoRA layer is taken from its factors, without the product that PEFT's cache saves, so there
    is nothing to keep.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        """Changes nothing."""

    def __exit__(self, *error: object) -> None:
        """Changes nothing."""

    def __call__(self, enabled: bool = True) -> None:
        self.enabled = enabled
