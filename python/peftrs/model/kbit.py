"""Models whose base is quantized: what transformers records of that, and what training over it needs."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

from peftrs.bases.resolve import resolve
from peftrs.core.dtype import NARROW
from peftrs.core.tree import original, places
from peftrs.errors import ConfigError

RECORDS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "hqq_quantized")
"""What transformers sets on a quantized model; its config has `quantization_config`."""


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of the model stores its weight quantized."""
    bases = (resolve(original(place.module)) for place in places(model))
    return any(base is not None and base.quantized for base in bases)


def no_longer_quantized(model: nn.Module) -> None:
    """Takes off the model and its config what says that it is quantized."""
    held: Any = model
    for name in RECORDS:
        if name in model.__dict__:
            delattr(held, name)
    if "is_quantized" in model.__dict__:
        held.is_quantized = False
    settings = getattr(model, "config", None)
    if hasattr(settings, "quantization_config"):
        delattr(settings, "quantization_config")


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freezes a model and makes it fit to be trained over with a quantized base; to be called before
    `get_peft_model`.

    Parameters of 16-bit dtypes (norms, embeddings, the head) become float32 where the quantized layers are
    bitsandbytes' or where there are none: other libraries compute in the dtype they were quantized for. With
    `use_gradient_checkpointing`, if a layer is quantized, activations are recomputed in the backward pass,
    `gradient_checkpointing_kwargs` being torch's own, and the embeddings' outputs need gradients unless
    `use_reentrant` is False, which does without. `auto_clear_cache` gives back what the casts left in the
    accelerator's cache. Raises `ConfigError` for a model that cannot recompute activations.
    """
    options = dict(gradient_checkpointing_kwargs or {})
    found = [
        base
        for place in places(model)
        if (base := resolve(original(place.module))) is not None and base.quantized
    ]
    enable = _checkpointing(model)
    if found and use_gradient_checkpointing and enable is None:
        raise ConfigError(
            f"a {type(model).__name__} cannot recompute activations; hint:"
            " prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)"
        )
    model.requires_grad_(False)
    if all(type(base).__module__.endswith(".bnb") for base in found):
        for parameter in model.parameters():
            # A 4-bit weight may be stored as if it were of a 16-bit dtype.
            if parameter.dtype in NARROW and type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.float()
        if auto_clear_cache:
            gc.collect()
            if torch.accelerator.is_available():
                (
                    torch.accelerator.memory.empty_cache()
                    if hasattr(torch.accelerator, "memory")
                    else torch.cuda.empty_cache()
                )
    if found and use_gradient_checkpointing and enable is not None:
        if options.get("use_reentrant", True):
            ask_for_input_gradients(model)
        enable(gradient_checkpointing_kwargs or None)
    return model


def _checkpointing(model: nn.Module) -> Any:
    """What turns recomputing on, by the name that the model's version of transformers has for it."""
    newer = "activation_checkpointing_enable"
    return getattr(model, newer, getattr(model, "gradient_checkpointing_enable", None))


def ask_for_input_gradients(model: nn.Module) -> None:
    """Makes the embeddings' outputs need gradients: checkpointing that re-enters cuts off a graph whose
    inputs need none.
    """
    enable: Any = getattr(model, "enable_input_require_grads", None)
    if enable is not None:
        enable()
        return
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is not None:
        embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_(True))
