"""The sizes of a prompt that a model's config decides."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from peftrs import registry
from peftrs.config import PromptLearningConfig, TaskType
from peftrs.core.prompt import CacheEncoder
from peftrs.core.prompt_call import TASKS, refuse_checkpointing
from peftrs.errors import ConfigError, listed

NAMES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}
"""What the configs of architectures call the sizes that a prompt needs."""


def sizes(model: nn.Module, config: PromptLearningConfig) -> dict[str, Any]:
    """The fields of a prompt's config that the model decides. Raises `ConfigError` for what is missing or
    cannot be.

    Keys and values to be trained are an `AdapterError` on a model under gradient checkpointing.
    """
    if str(config.task_type) not in TASKS:
        raise ConfigError(
            f"a prompt needs a `task_type`, one of {listed(list(TASKS))}: it says what the model is given to"
            " read"
        )
    if config.num_virtual_tokens is None:
        raise ConfigError("Please specify `num_virtual_tokens` in `peft_config`")
    if _in_cache(config) and not config.inference_mode:
        refuse_checkpointing(model)
    settings: Any = getattr(model, "config", None)
    settings = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    settled: dict[str, Any] = {}
    for name, spellings in NAMES.items():
        stated = [value for spelling in spellings if (value := _get(settings, spelling)) is not None]
        settled[name] = (
            getattr(config, name) if getattr(config, name) is not None or not stated else stated[0]
        )
        if settled[name] is None:
            raise ConfigError(f"Please specify `{name}` in `peft_config`: the model's config does not say")
    heads = _get(settings, "num_key_value_heads")
    if _in_cache(config) and heads is not None:
        settled["num_attention_heads"], width = _widest(
            settings, heads, settled["token_dim"] // settled["num_attention_heads"]
        )
        settled["token_dim"] = settled["num_attention_heads"] * width
    if _in_cache(config) and settled["token_dim"] % settled["num_attention_heads"]:
        raise ConfigError(
            f"{settled['token_dim']} channels cannot be shared by {settled['num_attention_heads']} heads"
        )
    if config.num_transformer_submodules is None:
        settled["num_transformer_submodules"] = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    if config.encoder_hidden_size is None:
        settled["encoder_hidden_size"] = settled["token_dim"]
    return settled


def _in_cache(config: PromptLearningConfig) -> bool:
    return issubclass(cast(Any, registry.method(cast(str, config.peft_type))).encoder, CacheEncoder)


def _get(settings: Any, name: str) -> Any:
    return settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)


def _widest(settings: Any, heads: int, width: int) -> tuple[int, int]:
    """The heads and head size of keys, of the widest layers where layers differ."""
    layers = _get(settings, "per_layer_config")
    own = [layers[layer] for layer in range(_get(settings, "num_hidden_layers"))] if layers else []
    found = [
        (_get(one, "head_dim") or width, _get(one, "num_key_value_heads") or heads)
        for one in (settings, *own)
    ]
    widest = max(found, key=lambda pair: pair[0])
    return widest[1], widest[0]
