"""Putting a prompt into the calls of a model, by hooks: the same for training, plain calls and every step of
`generate`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs import _native
from peftrs.core.activation import Activation
from peftrs.core.prompt import CHILD, CacheEncoder, Encoder, Prompts, prompts_of
from peftrs.core.tree import embedding_layers
from peftrs.dtype import DTYPES, FLOATS
from peftrs.errors import AdapterError, PeftrsWarning
from peftrs.torch_private import hooks_of


@dataclass(frozen=True)
class Task:
    """What a task's models take: labels for every token, and types of tokens."""

    labelled: bool
    typed: bool


TASKS = {
    "CAUSAL_LM": Task(labelled=True, typed=False),
    "SEQ_2_SEQ_LM": Task(labelled=False, typed=False),
    "SEQ_CLS": Task(labelled=False, typed=True),
    "TOKEN_CLS": Task(labelled=True, typed=True),
    "QUESTION_ANS": Task(labelled=False, typed=True),
    "FEATURE_EXTRACTION": Task(labelled=False, typed=False),
}


@dataclass(frozen=True)
class Side:
    """The names of the arguments that say what a model reads, or one half of an encoder-decoder."""

    ids: str
    embeds: str
    mask: str
    positions: str


ONLY = Side("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""Of a model that is all there is, or of an encoder."""
DECODER = Side("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "decoder_position_ids")


class Before:
    """The hook that puts the active prompt into a module's calls, if it belongs there (`path` from the
    model).
    """

    def __init__(self, prompts: Prompts, path: str) -> None:
        self.prompts = prompts
        self.path = path

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        name = self.prompts.acting()
        if name is None or self.prompts.hosts[name] != self.path:
            return None
        call = dict(zip(parameters(module), inputs, strict=False)) | options
        tasks = call.pop("task_ids", None)
        enter(module, self.prompts.encoder(name), call, self.prompts.task_ids if tasks is None else tasks)
        return (), call


class After:
    """The hook that gives the active prompt the model's output, for a loss of its own."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        name = self.prompts.acting()
        return output if name is None else self.prompts.encoder(name).finish(output)


def plant(model: nn.Module, adapter: str, encoder: Encoder, activation: Activation) -> None:
    """Adds a prompt to a model, and the hooks that it needs."""
    prompts = prompts_of(model)
    if prompts is None:
        prompts = Prompts(activation)
        prompts.train(model.training)
        model.add_module(CHILD, prompts)
        model.register_forward_hook(After(prompts))
    path = host_of(model, encoder)
    host = model.get_submodule(path)
    if not any(isinstance(hook, Before) for hook in host._forward_pre_hooks.values()):
        host.register_forward_pre_hook(Before(prompts, path), with_kwargs=True)
    prompts[adapter] = encoder.train(model.training)
    prompts.hosts[adapter] = path


def uproot(model: nn.Module) -> None:
    """Takes all prompts off a model."""
    if prompts_of(model) is None:
        return
    del model._modules[CHILD]
    for module in model.modules():
        for hooks in hooks_of(module):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Before | After)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def host_of(model: nn.Module, encoder: Encoder) -> str:
    """The path of the module whose calls get the prompt: the model, or for keys and values what takes those
    inside it.

    Raises `AdapterError` where nothing takes keys and values.
    """
    if not isinstance(encoder, CacheEncoder) or "past_key_values" in parameters(model):
        return ""
    backbone = getattr(model, "base_model_prefix", None)
    inner = model._modules.get(backbone) if isinstance(backbone, str) else None
    if inner is not None and "past_key_values" in parameters(inner):
        return cast(str, backbone)
    raise AdapterError(
        f"{type(model).__name__} does not support past key values, which are required for prefix tuning"
    )


def parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward."""
    return _parameters(type(module).forward)


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def is_paired(module: nn.Module) -> bool:
    """Whether the model is an encoder with a decoder."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def enter(module: nn.Module, encoder: Encoder, call: dict[str, Any], task_ids: Tensor | None = None) -> None:
    """Puts a prompt into a call's arguments: where a cache holds it already, only the mask and the positions
    make room for it.
    """
    config, paired = encoder.config, is_paired(module)
    if not TASKS[config.task_type].typed and call.pop("token_type_ids", None) is not None:
        _warn("Token type ids are not supported for parameter efficient tuning. Ignoring token type ids")
    # The model counts it from its cache, which the caller does not know to hold the prompt.
    call.pop("cache_position", None)
    cached = length(call.get("past_key_values")) > 0
    if isinstance(encoder, CacheEncoder):
        if not cached:
            if module.training:
                refuse_checkpointing(module)
            encoder.lent = call.get("past_key_values") is None and call.get("use_cache") is False
            call["past_key_values"] = fill(call.get("past_key_values"), module, encoder, _batch(call, paired))
        widen(call, DECODER if paired else ONLY, config.num_virtual_tokens)
        return
    # An encoder whose output is given has read the prompt.
    if not (call.get("encoder_outputs") is not None if paired else cached):
        prepend(module, encoder, call, ONLY, task_ids)
    elif not paired:
        widen(call, ONLY, config.num_virtual_tokens)
    if paired and encoder.in_decoder and config.num_transformer_submodules == 2:
        if cached:
            widen(call, DECODER, config.num_virtual_tokens)
        else:
            prepend(module, encoder, call, DECODER, task_ids)


def prepend(
    module: nn.Module, encoder: Encoder, call: dict[str, Any], side: Side, task_ids: Tensor | None
) -> None:
    """Puts virtual tokens before what one side reads, with all that is said of its tokens."""
    count, paired = encoder.config.num_virtual_tokens, is_paired(module)
    ids, embeds, labels = call.pop(side.ids, None), call.get(side.embeds), call.get("labels")
    if embeds is None:
        if ids is None and side is DECODER and labels is not None:
            ids = cast(Any, module).prepare_decoder_input_ids_from_labels(labels)
        if ids is None:
            raise AdapterError(f"a prompt needs `{side.ids}` or `{side.embeds}` to stand before")
        embeds = word_embeddings(module)(ids)
    batch = len(embeds)
    if task_ids is not None:
        # Beams stand side by side.
        task_ids = task_ids.to(encoder.device).repeat_interleave(batch // len(task_ids))
    prompt = encoder.prompt(task_ids)
    prompt = prompt[:, count:] if side is DECODER else prompt[:, :count]
    call[side.embeds] = torch.cat((prompt.to(embeds).expand(batch, -1, -1), embeds), dim=1)
    positions, types = call.get(side.positions), call.get("token_type_ids")
    widen(call, side, count)
    if positions is not None:
        first = torch.arange(count, device=positions.device, dtype=positions.dtype).expand(
            *positions.shape[:-1], count
        )
        call[side.positions] = torch.cat((first, positions + count), dim=-1)
    if types is not None and side is ONLY:
        call["token_type_ids"] = torch.cat((types.new_zeros(len(types), count), types), dim=1)
    if labels is not None and (side is DECODER or (not paired and TASKS[encoder.config.task_type].labelled)):
        call["labels"] = encoder.labels(call, labels)


def widen(call: dict[str, Any], side: Side, count: int) -> None:
    """Makes room for virtual tokens in front: seen by all, and before every position."""
    mask, positions = call.get(side.mask), call.get(side.positions)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            kind = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise AdapterError(
                f"`{side.mask}` has {kind}, where a prompt needs (batch, tokens) to make room in; hint: pass"
                " the mask of the text, and to fill a static cache call `generate` of the PeftModel"
            )
        call[side.mask] = torch.cat((mask.new_ones(len(mask), count), mask), dim=1)
    if positions is not None:
        call[side.positions] = positions + count


def word_embeddings(model: nn.Module) -> nn.Module:
    """What embeds the model's tokens. Raises `AdapterError` where the model does not say."""
    found, _ = embedding_layers(model)
    if found is None:
        raise AdapterError(
            f"{type(model).__name__} does not say what embeds its tokens (`get_input_embeddings`)"
        )
    return found


def load_tokenizer(name: str, options: dict[str, Any]) -> Any:
    """A tokenizer by the name or path that a config gives; no code of its own is run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, **options)


def read_tensors(path: str) -> dict[str, Tensor]:
    """The floating-point tensors of a safetensors file, by name.

    Raises `CheckpointError`; pickles are not read.
    """
    file = _native.Checkpoint.model(path)
    rows = [(name, DTYPES.get(kind), shape) for name, kind, shape in file.entries()]
    return {
        name: torch.frombuffer(file.read(name), dtype=dtype).view(shape)
        for name, dtype, shape in rows
        if dtype in FLOATS
    }


# Keys and values.


def length(held: Any) -> int:
    """How many tokens a cache holds, whatever its kind."""
    if held is None:
        return 0
    if isinstance(held, tuple | list):
        return int(held[0][0].shape[-2]) if held else 0
    return int(held.get_seq_length())


def fill(held: Any, module: nn.Module, encoder: CacheEncoder, batch: int) -> Any:
    """The cache given, or a new one, with the prompt in every layer that keeps keys and values."""
    from transformers import DynamicCache, EncoderDecoderCache

    settings = cast(Any, module).config
    settings = settings.get_text_config(decoder=True) if hasattr(settings, "get_text_config") else settings
    if held is None or isinstance(held, tuple | list):
        held = (
            DynamicCache(config=settings)
            if "config" in inspect.signature(DynamicCache).parameters
            else DynamicCache()
        )
        held = EncoderDecoderCache(held, DynamicCache()) if is_paired(module) else held
    own = held.self_attention_cache if isinstance(held, EncoderDecoderCache) else held
    last = (getattr(settings, "num_hidden_layers", None) or encoder.config.num_layers) - (
        getattr(settings, "num_kv_shared_layers", None) or 0
    )
    left_out, homes = [], layer_devices(module)
    for layer, (keys, values) in enumerate(encoder.key_values(batch, cast(Any, module).dtype)):
        shape = _shape(settings, layer) or (keys.shape[1], keys.shape[3])
        fits = shape[0] <= keys.shape[1] and shape[1] <= keys.shape[3]
        layers = getattr(own, "layers", ())
        if layer < last and fits and (layer >= len(layers) or hasattr(layers[layer], "update")):
            home = homes.get(layer, keys.device)
            own.update(*(states[:, : shape[0], :, : shape[1]].to(home) for states in (keys, values)), layer)
        else:
            left_out.append(layer)
    if len(left_out) == encoder.config.num_layers:
        heads, width = encoder.config.num_attention_heads, encoder.config.token_dim
        raise AdapterError(
            f"no layer takes keys and values of {heads} heads and {width} channels; hint: set both in the"
            " config"
        )
    if left_out:
        _warn(
            f"the prompt is left out of layers {left_out}, which take other keys and values or share another"
            " layer's"
        )
    return held


def layer_devices(module: nn.Module) -> dict[int, Any]:
    """Where each numbered layer of a model that is spread over devices computes; offloaded ones do on the
    first of them.
    """
    held: dict[str, Any] = getattr(module, "hf_device_map", None) or {}
    main = next((device for device in held.values() if device not in ("cpu", "disk")), None)
    numbered = [
        ([part for part in name.split(".") if part.isdigit()], device) for name, device in held.items()
    ]
    found = {
        int(numbers[0]): main if device in ("cpu", "disk") else device
        for numbers, device in numbered
        if numbers
    }
    return {} if main is None else found


def _shape(settings: Any, layer: int) -> tuple[int, int] | None:
    """The heads and head size of one layer's keys, where a model's layers differ and their configs say
    both.
    """
    own = getattr(settings, "per_layer_config", None)
    if own is None or not getattr(settings, "layer_types", None):
        return None
    heads, width = (getattr(own[layer], name, None) for name in ("num_key_value_heads", "head_dim"))
    return None if heads is None or width is None else (heads, width)


def _batch(call: dict[str, Any], paired: bool) -> int:
    names = (DECODER.ids, DECODER.embeds, "labels") if paired else ()
    given = next(call[name] for name in (*names, ONLY.ids, ONLY.embeds) if call.get(name) is not None)
    return len(given)


def refuse_checkpointing(module: nn.Module) -> None:
    """Raises `AdapterError` where a module recomputes activations in training, for which it keeps no
    cache.
    """
    if any(getattr(inner, "gradient_checkpointing", False) for inner in module.modules()):
        raise AdapterError(
            "a prompt of keys and values does not work with gradient checkpointing, which drops them; turn"
            " it off"
        )


def _warn(text: str) -> None:
    warnings.warn(text, PeftrsWarning, stacklevel=7)
