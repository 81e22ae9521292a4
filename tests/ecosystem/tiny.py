"""What the checks of other libraries share: the examples' tiny models, one more, and how to move and compare
them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from examples.tiny import SIZES, bert, llama, saved, sentences, stable_diffusion, tokenizer

__all__ = ["bert", "distance", "llama", "saved", "sentences", "stable_diffusion", "stir", "t5", "tokenizer"]


def t5() -> T5ForConditionalGeneration:
    """A T5, the same on every call."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": SIZES["vocab_size"],
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
    }
    return T5ForConditionalGeneration(
        T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    )


def stir(model: nn.Module, by: float = 0.1) -> None:
    """Moves every trainable parameter, so that adapters that start as nothing act."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn_like(parameter)


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())
