"""PEFT's layer classes as questions: `isinstance(module, LoraLayer)` asks what adapters a layer holds, not
how it was made.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from peftrs.bases.kinds import LayerKind
from peftrs.compat.names import METHODS
from peftrs.core.layer import AdaptedLayer
from peftrs.core.replace import ReplacedModule

KINDS = {
    "Linear": LayerKind.LINEAR,
    "Embedding": LayerKind.EMBEDDING,
    "Conv1d": LayerKind.CONV1D,
    "Conv2d": LayerKind.CONV2D,
    "Conv3d": LayerKind.CONV3D,
    "MultiheadAttention": LayerKind.ATTENTION,
    "ParamWrapper": LayerKind.PARAMETER,
}
"""The kind of layer that a class of this name is for, the method's name before it or not."""

QUANTIZED = ("Linear4bit", "Linear8bitLt")
"""Classes for layers of bitsandbytes, whose names they share."""

LIBRARIES = {
    "AqlmLoraLinear": "aqlm", "AwqLoraLinear": "awq", "EetqLoraLinear": "eetq", "GPTQLoraLinear": "gptq",
    "HqqLoraLinear": "hqq",
    "TeLinear": "te", "TorchaoLoraLinear": "torchao",
}  # fmt: skip
"""LoRA's classes for layers of other libraries, and the file of the base that presents those."""

SLOTS = {
    "lora": ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
"""Containers of tensors that code reads off the class, which may be before peftrs has the method."""


class Virtual(type):
    """The class of classes that have no instances of their own, only a test."""

    peft_type: str
    kind: LayerKind | None
    base: str | None

    def __instancecheck__(cls, module: Any) -> bool:
        if not isinstance(module, AdaptedLayer) or (
            cls.kind is not None and module.spec.kind is not cls.kind
        ):
            return False
        if cls.base in LIBRARIES:
            if type(module.base).__module__ != f"peftrs.bases.{LIBRARIES[cls.base]}":
                return False
        elif cls.kind is LayerKind.LINEAR:
            quantized = type(module.get_base_layer()).__name__
            if (quantized if quantized in QUANTIZED else None) != cls.base:
                return False
        held = [adapter for adapter in module.adapters.values() if adapter.method.public]
        return any(adapter.config.peft_type == cls.peft_type for adapter in held)


class Auxiliary(type):
    """The class of the classes of what is trained beside a method's own layers."""

    rows_alone = False

    def __instancecheck__(cls, module: Any) -> bool:
        if isinstance(module, AdaptedLayer):
            return not all(adapter.method.public for adapter in module.adapters.values())
        return isinstance(module, ReplacedModule) and not cls.rows_alone


class AuxiliaryTrainingWrapper(metaclass=Auxiliary):
    """A module trained whole, or an embedding of which an adapter of another kind trains rows."""


class TrainableTokensWrapper(metaclass=Auxiliary):
    """An embedding, or what is tied to one, of which an adapter of another kind trains rows."""

    rows_alone = True


@cache
def layer_class(folder: str, name: str) -> type | None:
    """The class `name` of `peft.tuners.<folder>`'s modules, or None if it is not one of a layer."""
    stem = METHODS[folder]
    bare = name.removeprefix(stem) or name
    quantized = bare in QUANTIZED or (folder == "lora" and bare in LIBRARIES)
    if bare not in KINDS and not quantized and name != f"{stem}Layer":
        return None
    kind = LayerKind.LINEAR if quantized else KINDS.get(bare)
    place = f"peft.tuners.{folder}.layer"
    held = {
        "__doc__": f"A {kind or 'layer'} with an adapter of the type {folder.upper()}.",
        "__module__": place,
        "__new__": _refuse,
        "peft_type": folder.upper(),
        "kind": kind,
        "base": bare if quantized else None,
        "adapter_layer_names": SLOTS.get(folder, ()),
    }
    parent = None if name == f"{stem}Layer" else layer_class(folder, f"{stem}Layer")
    return Virtual(name, (parent or AdaptedLayer,), held)


def _refuse(cls: type, *arguments: Any, **options: Any) -> Any:
    raise TypeError(
        f"{cls.__name__} only tells layers apart; hint: adapters come into a model by `get_peft_model`"
    )
