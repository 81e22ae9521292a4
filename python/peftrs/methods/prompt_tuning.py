"""Prompt tuning: trained virtual tokens before the text.

Lester et al. 2021, https://arxiv.org/abs/2104.08691.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftrs.config import PeftType, PromptLearningConfig
from peftrs.core.prompt import Encoder, PromptMethod, rows_of
from peftrs.core.prompt_call import load_tokenizer
from peftrs.errors import ConfigError
from peftrs.registry import register


class PromptTuningInit(StrEnum):
    """Where the first values come from: a text's tokens, tokens drawn from the vocabulary, or nowhere."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """The settings of prompt tuning: PEFT's names, defaults and file format.

    With the init TEXT the tokenizer that `tokenizer_name_or_path` names is read when the adapter is made,
    never when it is loaded.
    """

    kind: ClassVar[PeftType] = PeftType.PROMPT_TUNING
    sources: ClassVar[tuple[str, ...]] = (
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    )

    prompt_tuning_init: str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.peft_type = self.kind
        super().__post_init__()
        faults = []
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            needed = [
                name
                for name in ("tokenizer_name_or_path", "prompt_tuning_init_text")
                if getattr(self, name) is None
            ]
            faults += [f"When prompt_tuning_init='TEXT', {name} can't be None." for name in needed]
        elif self.tokenizer_kwargs:
            faults.append("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")
        if faults:
            raise ConfigError(" ".join(faults))


class PromptEmbedding(Encoder):
    """The virtual tokens themselves, (tokens, embedding)."""

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        tokens = (
            None
            if word_embeddings is None
            else self.first_tokens(config, cast(nn.Embedding, word_embeddings))
        )
        if tokens is not None:
            self.embedding.weight.data = rows_of(cast(nn.Module, word_embeddings), tokens)

    def first_tokens(self, config: Any, word_embeddings: nn.Embedding) -> Tensor | None:
        """The tokens whose embeddings are the first values, or None for random values."""
        count = self.shape(config)[0]
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            return torch.randint(0, word_embeddings.num_embeddings, (count,))
        if config.prompt_tuning_init == PromptTuningInit.TEXT:
            tokens = torch.tensor(tokenize(config))
            return tokens.repeat(-(-count // len(tokens)))[:count]
        return None


def tokenize(config: PromptTuningConfig) -> list[int]:
    """The tokens of the config's text. The tokenizer's own code is never run, whatever the config says."""
    options = {
        key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"
    }
    tokens = list(
        load_tokenizer(cast(str, config.tokenizer_name_or_path), options)(config.prompt_tuning_init_text)[
            "input_ids"
        ]
    )
    if not tokens:
        raise ConfigError(
            f"prompt_tuning_init_text {config.prompt_tuning_init_text!r} has no tokens to begin with"
        )
    return tokens


@register
class PromptTuning(PromptMethod):
    """Virtual tokens, trained one by one."""

    name = "PROMPT_TUNING"
    config = PromptTuningConfig
    encoder = PromptEmbedding
