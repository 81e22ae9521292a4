"""PEFT's names of what its own methods are made of, and of the defaults of methods to come: they import, and
refuse to be used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from peftrs.errors import ConfigError
from peftrs.registry import COMING

TABLE = re.compile(r"TRANSFORMERS_MODELS_TO_(?P<method>[A-Z0-9]+)_(TARGET|FEEDFORWARD)_MODULES_MAPPING")

PARTS = {
    "AdaptedAttention", "AdaptedAttentionGPT", "ArrowLoraLinearLayer", "BdLoraLinearVariant",
    "Bnb4bitBackend",
    "Bnb8bitBackend", "CordaConfig", "DoraConv1dLayer", "DoraConv2dLayer", "DoraConv3dLayer",
    "DoraEmbeddingLayer",
    "DoraLinearLayer", "FlattenDims", "ForwardOnlyQuantizationBackend", "HqqBackend", "IncrementalPCA",
    "LoraParallelLinear", "LoraVariant", "LycorisConfig", "LycorisLayer", "LycorisTuner",
    "MultiplicativeDropoutLayer",
    "OFTRotationModule", "PeftConcatenate", "PermuteDims", "QuantizationBackend", "RankAllocator",
    "SVDConv2d", "SVDLinear",
    "SVDQuantLinear", "TorchaoBackend", "TpInfo", "TrainableTokensLayer", "XLoraClassifier",
    "XLoraConv2dLayer",
    "XLoraEmbeddingLayer", "XLoraLinearLayer", "_set_trainable", "create_attention_mask", "dispatch_aqlm",
    "dispatch_awq",
    "dispatch_bnb_4bit", "dispatch_bnb_8bit", "dispatch_default", "dispatch_eetq", "dispatch_gptq",
    "dispatch_hqq",
    "dispatch_inc", "dispatch_megatron", "dispatch_torchao", "dispatch_transformer_engine",
    "dtensor_from_local_like",
    "estimate_gradients", "get_alora_offsets_for_forward", "get_alora_offsets_for_generate",
    "get_embedding_layer_name",
    "get_gptqmodel_quant_linear", "get_quantization_kwargs", "has_valid_embedding_base_layer", "loftq_init",
    "preprocess_corda", "quantization_extra_repr", "reduce_intruder_dimension",
    "resolve_quantization_backend",
    "set_additional_trainable_modules", "torch_load",
}  # fmt: skip
"""Parts of the methods themselves."""


class Part(type):
    """The class of the placeholders: nothing is an instance of one, and using one is an error."""

    def __call__(cls, *inputs: Any, **options: Any) -> Any:
        raise ConfigError(
            f"`{cls.__name__}` is a part that PEFT's methods are made of, and peftrs has none such; hint:"
            " what methods, layers and bases are made of here is in `peftrs.core` and `peftrs.bases`"
        )


class Defaults(Mapping[str, Any]):
    """The default targets of a method to come: empty to look at, and an error to ask."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __getitem__(self, model_type: str) -> Any:
        raise ConfigError(
            f"{self.method} is not built yet in peftrs, and has no default targets for {model_type!r}"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@cache
def part(name: str) -> Any:
    """What stands for a name of a part, or None if it is none."""
    if name in PARTS:
        text = "Stands for a part of PEFT's methods; calling it raises `ConfigError`."
        return Part(name, (), {"__doc__": text, "__module__": __name__})
    table = TABLE.fullmatch(name)
    coming = {method.replace("_", ""): method for method in COMING}
    return Defaults(coming[table["method"]]) if table and table["method"] in coming else None
