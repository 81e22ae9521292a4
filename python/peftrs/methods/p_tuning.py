"""P-tuning: virtual tokens that a small network makes of trained ones.

Liu et al. 2021, https://arxiv.org/abs/2103.10385.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

from torch import Tensor, nn

from peftrs.config import PeftType, PromptLearningConfig
from peftrs.core.prompt import Encoder, PromptMethod
from peftrs.errors import PeftrsWarning
from peftrs.registry import register


class PromptEncoderReparameterizationType(StrEnum):
    """The network that makes the tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """The settings of P-tuning: PEFT's names, defaults and file format."""

    encoder_reparameterization_type: str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        self.peft_type = PeftType.P_TUNING
        super().__post_init__()


class PromptEncoder(Encoder):
    """The tokens as a network makes them: three linear layers, or an LSTM in both directions and two linear
    layers.
    """

    network = ("lstm_head", "mlp_head")

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        if config.inference_mode:
            return
        width, hidden = config.token_dim, config.encoder_hidden_size
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            options = {"num_layers": config.encoder_num_layers, "dropout": config.encoder_dropout}
            self.lstm_head = nn.LSTM(width, hidden, bidirectional=True, batch_first=True, **options)
            self.mlp_head = nn.Sequential(
                nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width)
            )
        else:
            if config.encoder_num_layers != PromptEncoderConfig.encoder_num_layers:
                text = "`encoder_num_layers` is ignored: the MLP has exactly two hidden layers"
                warnings.warn(text, PeftrsWarning, stacklevel=2)
            hidden_layers = (nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
            self.mlp_head = nn.Sequential(*hidden_layers, nn.Linear(hidden, width))

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        tokens = super().forward(indices)
        if "lstm_head" in self._modules:
            tokens = self.lstm_head(tokens)[0]
        return cast(Tensor, self.mlp_head(tokens)) if self.made else tokens


@register
class PTuning(PromptMethod):
    """Virtual tokens, made by a network that is trained with them."""

    name = "P_TUNING"
    config = PromptEncoderConfig
    encoder = PromptEncoder
