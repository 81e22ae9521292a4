"""Helpers of PEFT's inner modules that are a line or a few: names and patterns, devices, and what quantized
tensors are.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from peftrs.core.layer import AdaptedLayer
from peftrs.core.prompt_call import layer_devices
from peftrs.errors import ConfigError

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")

MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}


def str_to_bool(value: str) -> int:
    """1 for yes and its like, 0 for no. Raises `ValueError` for anything else."""
    answers = {
        **dict.fromkeys(("y", "yes", "t", "true", "on", "1"), 1),
        **dict.fromkeys(("n", "no", "f", "false", "off", "0"), 0),
    }
    if value.lower() not in answers:
        raise ValueError(f"invalid truth value {value.lower()}")
    return answers[value.lower()]


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository has a file, or None where that cannot be told; with HF_HUB_OFFLINE nobody is
    asked.
    """
    if str_to_bool(os.environ.get("HF_HUB_OFFLINE", "0")):
        return None
    from huggingface_hub import file_exists

    try:
        return bool(file_exists(repo_id, filename, **kwargs))
    except (OSError, ValueError):
        return None


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """How a pattern of `target_modules` matches a module's whole name."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first key of a rank or alpha pattern that a module's name ends with, or the name itself."""
    return next((key for key in pattern_keys if re.fullmatch(rf"(.*\.)?({key})", key_to_match)), key_to_match)


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """How a model was quantized, if it was by this method."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    return found if getattr(model, "quantization_method", None) == method else None


def _get_no_split_modules(model: nn.Module) -> set[str]:
    named: Iterable[str] = getattr(model, "_no_split_modules", None) or ()
    return set(named)


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers was told that DeepSpeed's ZeRO-3 is on."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def get_bnb_param_type(param: Tensor) -> Literal[False, "4bit", "8bit"]:
    """What kind of a tensor of bitsandbytes this is, if it is one."""
    kinds: dict[str, Literal["4bit", "8bit"]] = {"Params4bit": "4bit", "Int8Params": "8bit"}
    return kinds.get(type(param).__name__, False)


def dequantize_bnb_weight(weight: Any, state: Any = None) -> Tensor:
    """The numbers that a weight of bitsandbytes stands for; `state` is the layer's, for those of 8 bits."""
    from bitsandbytes import functional

    if get_bnb_param_type(weight) == "4bit":
        return cast(Tensor, functional.dequantize_4bit(weight.data, weight.quant_state))
    if state is None:
        raise ValueError(
            "No `state` was passed for bnb 8bit quantized weights: it is the attribute `state` of their layer"
        )
    scales = weight.SCB if state.SCB is None else state.SCB
    return cast(Tensor, functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device)))


def is_gptqmodel_quant_linear(module: nn.Module | None) -> bool:
    """Whether a module is a quantized layer of gptqmodel."""
    kinds = () if module is None else type(module).__mro__
    return any(one.__name__ == "BaseQuantLinear" and one.__module__.startswith("gptqmodel.") for one in kinds)


def is_gptqmodel_awq_layer(module: nn.Module | None) -> bool:
    """Whether it is one of those for AWQ."""
    held = getattr(module, "SUPPORTS_METHODS", ()) if is_gptqmodel_quant_linear(module) else ()
    return any(method.value == "awq" for method in held)


def get_layer_device_map(model: nn.Module) -> dict[int, torch.device]:
    """Where each layer of a model that is spread over devices computes."""
    whole = getattr(model, "hf_device_map", {}).get("")
    layers = range(cast(Any, model).config.num_hidden_layers) if whole is not None else ()
    return layer_devices(model) if whole is None else dict.fromkeys(layers, whole)


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """Where the parts of a model are, by name: all on one device where accelerate spread nothing."""
    spread: dict[str, Any] | None = getattr(model, "hf_device_map", None)
    return {"": next(model.parameters()).device} if spread is None else spread


def skip_init_on_device(func: Callable[Inputs, Output]) -> Callable[Inputs, Output]:
    """A function that makes its tensors with values even inside `init_empty_weights`."""

    @wraps(func)
    def wrapper(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Output:
        with torch.device("cpu"):
            return func(*args, **kwargs)

    return wrapper


def onload_layer(layer: nn.Module) -> AbstractContextManager[None]:
    """An adapted layer with its tensors in their place inside the `with`, and kept as they are at its end."""
    return layer.frozen.at_hand(write=True) if isinstance(layer, AdaptedLayer) else nullcontext()


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """The names of a model's modules that an adapter is on, and of the others."""
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for name, module in tuner.model.named_modules():
        held = isinstance(module, AdaptedLayer) and adapter_name in module.adapters
        found["matched" if held else "unmatched"].append(name)
    return found


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module, with parameters of its own or the same ones."""
    shared = {id(one): one for one in module.parameters()} if share_weights else {}
    return copy.deepcopy(module, cast("dict[int, Any]", shared))


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """What a module is called in a model, or "" if it is not in it."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def starcoder_model_postprocess_past_key_value(past_key_values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Keys and values, (2, batch, heads, tokens, size) a layer, as the first StarCoder models kept them for
    their one head.

    (batch, tokens, 2 * size), of the first head.
    """
    return tuple(layer[:, :, 0].permute(1, 2, 0, 3).flatten(2) for layer in past_key_values)


def get_default_import_allowlist() -> list[str]:
    """The packages that a config may have code imported from: none, whatever it names."""
    return []


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """Whether a module is one of these packages, or in one."""
    return any(parent_name == name or parent_name.startswith(f"{name}.") for name in allowlist)


def register_peft_method(
    *,
    name: str,
    config_cls: Any,
    model_cls: Any,
    prefix: str | None = None,
    is_mixed_compatible: bool = False,
) -> None:
    """Refuses, with a `ConfigError`: a method of PEFT's form wraps layers itself, which methods do not
    here.
    """
    raise ConfigError(
        f"register_peft_method({name!r}): methods made of PEFT's tuner classes do not run on peftrs; hint:"
        " state what the method changes in a subclass of `peftrs.core.method.Method`, and put"
        " `peftrs.registry.register` before it"
    )
