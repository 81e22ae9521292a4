"""What `peft.utils` offers beside adapters: small functions that training scripts and other libraries take
from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftrs.config import PromptLearningConfig
from peftrs.core import manage
from peftrs.core.prompt_call import layer_devices
from peftrs.core.tree import places, wrappers
from peftrs.planning.prompt_sizes import sizes
from peftrs.planning.settle import input_embeddings

ALLOWED_COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that adapters compute in."""
UPCAST_DTYPES = (torch.bfloat16, torch.float16)
"""The dtypes that adapters are widened from."""

TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}
"""What must be done to a prefix for some models: nothing, for any."""


def infer_device() -> str:
    """The kind of device that there is to compute on: "cuda", "mps", "xpu", or else "cpu"."""
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        return "cpu" if found is None else found.type
    return "cpu"


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """What a decoder reads for these labels, (batch, tokens): all moved right by one, ignored ones made
    padding.
    """
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat((start, input_ids[:, :-1]), dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def bloom_model_postprocess_past_key_value(
    past_key_values: Sequence[Tensor],
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values (layers, 2, batch, heads, tokens, size) in the layout of the first Bloom models.

    Keys (batch * heads, size, tokens) and values (batch * heads, tokens, size), layer by layer; keys in the
    order of numbers that prefixes trained with PEFT have there, which is not that of a transposed matrix.
    """
    joined = torch.cat([*past_key_values])
    layers, batch, heads, tokens, size = joined.shape
    keys, values = joined.chunk(2)
    keys = keys.transpose(2, 3).reshape(layers // 2, batch * heads, size, tokens)
    return tuple(zip(keys, values.reshape(layers // 2, batch * heads, tokens, size), strict=True))


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What is the same of tensors that share all their memory: device, address, bytes."""
    storage = tensor.untyped_storage()
    address = id(tensor) if tensor.device.type == "meta" else storage.data_ptr()
    return tensor.device, address, storage.nbytes()


def map_cache_to_layer_device_map(model: nn.Module, cache: Any) -> None:
    """Moves the keys and values in a cache to where the layers of a model that is spread over devices
    compute.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    for layer, device in layer_devices(model).items():
        if not hasattr(cache, "layers"):  # transformers 4 keeps two lists
            for states in (cache.key_cache, cache.value_cache):
                states[layer : layer + 1] = [one.to(device) for one in states[layer : layer + 1]]
        elif layer < len(cache.layers):
            held = cache.layers[layer]
            held.keys, held.values = held.keys.to(device), held.values.to(device)


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    if (input_ids is None) and (inputs_embeds is None):
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    given: Any = input_ids if input_ids is not None else inputs_embeds
    return len(given)


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    found = input_embeddings(model, list(places(model)))
    return default if found is None else found.rpartition(".")[2]


def _is_valid_match(key: str, target_key: str) -> bool:
    return key == target_key or key.endswith(f".{target_key}")


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    for _, wrapper in wrappers(model):
        wrapper.require_grad([adapter_name], requires_grad=False)


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    manage.set_adapter(model, adapter_name, inference_mode)


def _prepare_prompt_learning_config(
    peft_config: PromptLearningConfig, model_config: Any
) -> PromptLearningConfig:
    holder = nn.Module()
    holder.config = model_config
    for name, value in sizes(holder, peft_config).items():
        setattr(peft_config, name, value)
    return peft_config
