"""Which base presents a module.

A library's file is imported when a layer of that library is met, and not before.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, cast

from torch import nn

from peftrs.bases import dense
from peftrs.bases.base import Base

FILES = {
    "bitsandbytes": ("bnb",),
    "hqq": ("hqq",),
    "torchao": ("torchao",),
    "gptqmodel": ("gptq", "awq"),
    "awq": ("awq",),
    "aqlm": ("aqlm",),
    "eetq": ("eetq",),
    "neural_compressor": ("inc",),
    "transformer_engine": ("te",),
}
"""The files for each library, by the first name of the modules that its classes come from."""


def resolve(module: nn.Module) -> Base | None:
    """The base that presents a module, or None if no method can change it."""
    base = of_library(module)
    if base is not None:
        return base
    base = dense.resolve(module)
    if base in (dense.LINEAR, dense.EMBEDDING) and _unknown(module, base):
        return None
    return base


def of_library(module: nn.Module) -> Base | None:
    """The base of a quantized layer, or None for any other module."""
    kind: Any = type(module)
    weight: Any = type(module._parameters.get("weight"))
    for file in _files(kind, weight):
        base = import_module(f"peftrs.bases.{file}").resolve(module)
        if base is not None:
            return cast(Base, base)
    return None


def _unknown(module: nn.Module, base: Base) -> bool:
    """Whether a layer is quantized by what no file knows, such as bitsandbytes' embeddings or transformers'
    own FP8 layers.
    """
    scaled = any(name.startswith("weight_scale") for name in (*module._parameters, *module._buffers))
    return scaled or not base.parameters(module)[0].is_floating_point()


@cache
def _files(kind: type, weight: type) -> tuple[str, ...]:
    """Those of the libraries that a module's classes come from, or its weight's: some quantize the tensor of
    an `nn.Linear`.
    """
    libraries = [one.__module__.partition(".")[0] for one in (*kind.__mro__, *weight.__mro__)]
    return tuple(dict.fromkeys(file for library in libraries for file in FILES.get(library, ())))
