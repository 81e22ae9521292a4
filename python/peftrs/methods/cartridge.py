"""Cartridges: a cache of keys and values that is trained as it stands, mostly begun with that of a text.

Eyuboglu et al. 2025, https://arxiv.org/abs/2506.06266.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.config import PeftType, PromptLearningConfig
from peftrs.core.prompt import PROMPT, CacheEncoder, PromptMethod, put
from peftrs.errors import ConfigError
from peftrs.registry import register


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """The settings of a cartridge: PEFT's names, defaults and file format.

    The first `num_frozen_tokens` stay as they begin.
    """

    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        self.peft_type = PeftType.CARTRIDGE
        super().__post_init__()
        if self.num_frozen_tokens < 0:
            raise ConfigError(f"`num_frozen_tokens` must be >= 0, got {self.num_frozen_tokens}.")
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ConfigError(
                "`num_frozen_tokens` must be <= `num_virtual_tokens`, got"
                f" num_frozen_tokens={self.num_frozen_tokens} and"
                f" num_virtual_tokens={self.num_virtual_tokens}."
            )


class CartridgeEncoder(CacheEncoder):
    """The keys and values of all layers: the rows that stay, and those that are trained."""

    frozen_embedding: nn.Parameter | None

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        nn.Module.__init__(self)
        self.config = config
        rows, width = self.shape(config)
        self.num_frozen_tokens = config.num_frozen_tokens
        self.num_trainable_tokens = rows - self.num_frozen_tokens
        frozen = torch.randn(self.num_frozen_tokens, width)
        self.frozen_embedding = nn.Parameter(frozen, requires_grad=False) if self.num_frozen_tokens else None
        self.trainable_embedding = nn.Parameter(torch.randn(self.num_trainable_tokens, width))

    @property
    def weight(self) -> Tensor:
        """All rows, (tokens, layers * 2 * heads * head size)."""
        held = self.frozen_embedding
        return self.trainable_embedding if held is None else torch.cat((held, self.trainable_embedding))

    @property
    def embedding(self) -> CartridgeEncoder:  # type: ignore[override]
        """This itself, whose `weight` is what other encoders' embedding has."""
        return self

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        return self.weight[indices]

    def trained(self) -> list[nn.Parameter]:
        return [self.trainable_embedding]

    def saved(self) -> dict[str, Tensor]:
        return {PROMPT: self.weight.detach()}

    def load(self, name: str, value: Tensor, home: torch.device) -> None:
        if self.frozen_embedding is not None:
            put(self, "frozen_embedding", value[: self.num_frozen_tokens], home)
        put(self, "trainable_embedding", value[self.num_frozen_tokens :], home)


@register
class Cartridge(PromptMethod):
    """Keys and values, trained as they are."""

    name = "CARTRIDGE"
    config = CartridgeConfig
    encoder = CartridgeEncoder


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache of one sequence as a prompt, (tokens, layers * 2 * heads * head size).

    Raises `ValueError` for a cache of several sequences, of too few tokens, or whose layers differ.
    """
    layers = [(layer[0], layer[1]) for layer in past_key_values]
    shapes = {tuple(states.shape) for layer in layers for states in layer}
    if len(shapes) != 1:
        raise ValueError(
            f"a prompt needs keys and values of one shape in all layers, not {sorted(shapes)[:4]}"
        )
    batch, _, tokens, _ = shapes.pop()
    if batch != 1 or tokens < num_virtual_tokens:
        raise ValueError(
            f"the cache holds {batch} sequences of {tokens} tokens; needed is one of at least"
            f" {num_virtual_tokens}"
        )
    # (layers * 2, heads, tokens, size) to a row for each token.
    states = torch.cat([torch.cat(layer) for layer in layers])[:, :, :num_virtual_tokens]
    return states.permute(2, 0, 1, 3).reshape(num_virtual_tokens, -1)


def initialize_kv_prefix_from_past_key_values(
    model: Any,
    *,
    adapter_name: str | None = None,
    past_key_values: Any,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Begins a cartridge, or prefix tuning without a network, with the first tokens of a cache; gives what
    was taken.

    Raises `ValueError` for an adapter of another kind, or a cache that does not fit.
    """
    encoder = model.prompt_encoder[model.active_adapter if adapter_name is None else adapter_name]
    if not isinstance(encoder, CacheEncoder):
        raise ValueError(
            f"adapter must be a CARTRIDGE or PREFIX_TUNING adapter, not {encoder.config.peft_type}"
        )
    count = encoder.config.num_virtual_tokens if num_virtual_tokens is None else num_virtual_tokens
    prompt = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    encoder.load_prompt_embeddings(prompt)
    return prompt


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Begins a cartridge with the cache that the base model makes of a text; a chat template makes a system
    message of it.
    """
    tokens = None
    if use_chat_template and getattr(tokenizer, "chat_template", None) is not None:
        message = [{"role": "system", "content": text}]
        tokens = tokenizer.apply_chat_template(message, tokenize=True, return_dict=False, return_tensors="pt")
    if tokens is None:
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    tokens = tokens[:, :max_length].to(model.device)
    with torch.no_grad(), model.disable_adapter():
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True)
    return initialize_kv_prefix_from_past_key_values(
        model,
        adapter_name=adapter_name,
        past_key_values=cast(Any, output).past_key_values,
        num_virtual_tokens=num_virtual_tokens,
    )
