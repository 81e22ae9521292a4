"""Prefix tuning: trained keys and values before those of every attention layer.

Li and Liang 2021, https://arxiv.org/abs/2101.00190.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from peftrs.config import PeftType, PromptLearningConfig
from peftrs.core.prompt import CacheEncoder, PromptMethod
from peftrs.registry import register

ZERO = "zero"


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """The settings of prefix tuning: PEFT's names, defaults and file format.

    `prefix_projection` has a network of two layers make the keys and values; `init_weights="zero"` starts
    with zeros.
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType.PREFIX_TUNING
        super().__post_init__()


class PrefixEncoder(CacheEncoder):
    """The keys and values of all layers, (tokens, layers * 2 * heads * head size), or what a network makes
    them of.
    """

    network = ("transform",)

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        self.prefix_projection = config.prefix_projection
        last: nn.Module = self.embedding
        if config.prefix_projection and not config.inference_mode:
            tokens, width = self.shape(config)
            self.embedding = nn.Embedding(tokens, config.token_dim)
            last = nn.Linear(config.encoder_hidden_size, width)
            self.transform = nn.Sequential(
                nn.Linear(config.token_dim, config.encoder_hidden_size), nn.Tanh(), last
            )
        if config.init_weights == ZERO:
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        rows = super().forward(indices)
        return cast(Tensor, self.transform(rows)) if self.made else rows


@register
class PrefixTuning(PromptMethod):
    """Keys and values, trained as they are or made by a network."""

    name = "PREFIX_TUNING"
    config = PrefixTuningConfig
    encoder = PrefixEncoder
