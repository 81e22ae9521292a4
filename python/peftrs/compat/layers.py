"""PEFT's layer classes as questions: `isinstance(module, LoraLayer)` asks what adapters a layer holds, not how it was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftrs.bases.kinds import LayerKind
from peftrs.config import CONFIG_NAME
from peftrs.core.layer import AdaptedLayer

WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"


class Virtual(type):
    """The class of classes that have no instances of their own, only a test."""

    def __instancecheck__(cls, module: Any) -> bool:
        return isinstance(module, AdaptedLayer) and bool(cls.holds(module))  # type: ignore[attr-defined]


def _virtual(name: str, doc: str, holds: Callable[[AdaptedLayer], bool], names: Sequence[str] = ()) -> type:
    return Virtual(name, (), {"__doc__": doc, "holds": staticmethod(holds), "adapter_layer_names": tuple(names)})


def _has(prefix: str, *kinds: LayerKind) -> Callable[[AdaptedLayer], bool]:
    def holds(layer: AdaptedLayer) -> bool:
        fits = not kinds or layer.spec.kind in kinds
        return fits and any(adapter.method.prefix == prefix for adapter in layer.adapters.values())

    return holds


_LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
LoraLayer = _virtual("LoraLayer", "A layer with a LoRA adapter.", _has("lora_"), _LORA)
Linear = _virtual("Linear", "A linear layer with a LoRA adapter.", _has("lora_", LayerKind.LINEAR), _LORA)
Embedding = _virtual("Embedding", "An embedding with a LoRA adapter.", _has("lora_", LayerKind.EMBEDDING), _LORA)
Conv2d = _virtual("Conv2d", "A 2-D convolution with a LoRA adapter.", _has("lora_", LayerKind.CONV2D), _LORA)
Conv3d = _virtual("Conv3d", "A 3-D convolution with a LoRA adapter.", _has("lora_", LayerKind.CONV3D), _LORA)
ParamWrapper = _virtual("ParamWrapper", "A module with a LoRA adapter on a parameter.", _has("lora_", LayerKind.PARAMETER), _LORA)
LoHaLayer = _virtual("LoHaLayer", "A layer with a LoHa adapter.", _has("hada_"))
LoKrLayer = _virtual("LoKrLayer", "A layer with a LoKr adapter.", _has("lokr_"))


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """`peft.helpers.disable_input_dtype_casting`: adapters cast their inputs as they must, so there is nothing to turn off."""
    yield


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


__all__ = ["CONFIG_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME"]
