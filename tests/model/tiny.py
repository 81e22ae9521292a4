"""Small models of every shape that the tests of whole models need, the same at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

TOKENS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(3))


def llama(*, tied: bool = False, layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return BertForSequenceClassification(config).eval()


class Stack(nn.Module):
    """Numbered layers, as most models name them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


@torch.no_grad()
def shake(model: nn.Module, seed: int = 5) -> None:
    """Moves every trained tensor off its start, the same way for the same names."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    """What a model of transformers says of the same tokens."""
    output: Tensor = model.eval()(tokens).logits
    return output


def fingerprint(model: nn.Module) -> dict[str, tuple[int, bool, bytes]]:
    """Everything that must stay as it was where an operation is refused: names, identities, gradients,
    values.
    """
    return {
        name: (id(parameter), parameter.requires_grad, parameter.detach().numpy().tobytes())
        for name, parameter in model.named_parameters()
    }
