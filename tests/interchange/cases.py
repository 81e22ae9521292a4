"""The configurations whose files and outputs must agree with PEFT's, on small models that hold every kind of
layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D


class Experts(nn.Module):
    """A stack of experts over bare parameters, as mixture-of-experts models keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 8) / 3)
        self.wide = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eoi->bto", x, self.up)[..., :8] + x @ self.wide.T


class Toy(nn.Module):
    """Every kind of layer, one after the other; all of them matter to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(16, 8)
        self.lin0 = nn.Linear(8, 16)
        self.lin1 = nn.Linear(16, 8)
        self.hf = Conv1D(8, 8)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 3, padding=1, stride=(1, 2))
        self.conv3 = nn.Conv3d(4, 2, (1, 3, 3), padding=(0, 1, 1))
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.exp = Experts()
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        x = x + self.lin1(self.lin0(x).tanh()) + self.hf(x)
        x = x + self.conv1(x.mT).mT
        planes = self.conv2(x.unsqueeze(1))
        x = x + self.conv3(planes.unsqueeze(2)).flatten(1, 2).repeat_interleave(2, -1).mean(1)
        x = x + self.mha(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x + self.exp(x)))


class Odd(nn.Module):
    """Layers whose adapters have tensors without elements: five features are no multiple of two, so that
    blocks of two become blocks of one for OFT, and one layer has no outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.five, self.four, self.none = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(4, 0)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(self.five(x))
        return torch.cat([self.four(inner), self.none(inner)], 1)


def odd() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    return Odd().eval(), lambda model: model(x)


def toy() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 16, (3, 6), generator=torch.Generator().manual_seed(1))
    return Toy().eval(), lambda model: model(tokens)


def llama(*, tied: bool = False) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32,
        max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    tokens = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(1))
    return LlamaForCausalLM(config).eval(), lambda model: model(input_ids=tokens).logits


def bert() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    tokens = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(1))
    return BertForSequenceClassification(config).eval(), lambda model: model(input_ids=tokens).logits


@dataclass(frozen=True)
class Case:
    """A config class by name with its arguments, a model, and what is known to differ in PEFT and why."""

    id: str
    config: str
    arguments: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]] = toy
    tolerance: float = 2e-6
    trains: bool = True
    """Whether a few training steps must give PEFT's losses."""
    unmerged: bool = True
    """Whether PEFT's unmerged output is right; where not, only merged outputs are compared."""
    merges: bool = True
    """Whether PEFT merges it rightly."""
    same_targets: bool = True
    """Whether PEFT keeps the list of targets as it read it."""


def lora(label: str, **arguments: Any) -> Case:
    extra = {
        key: arguments.pop(key)
        for key in ("model", "tolerance", "trains", "unmerged", "merges", "same_targets")
        if key in arguments
    }
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": ["lin0", "lin1"], **arguments}
    return Case(f"lora-{label}", "LoraConfig", arguments, **extra)


def ia3(label: str, **arguments: Any) -> Case:
    return Case(f"ia3-{label}", "IA3Config", arguments)


def oft(label: str, **arguments: Any) -> Case:
    extra = {
        key: arguments.pop(key)
        for key in ("model", "tolerance", "trains", "unmerged", "merges")
        if key in arguments
    }
    return Case(
        f"oft-{label}",
        "OFTConfig",
        {"oft_block_size": 4, "target_modules": ["lin0", "lin1"], **arguments},
        **extra,
    )


CASES = [
    lora("linear"),
    lora("empty", model=odd, target_modules=["four", "none"]),
    lora("gaussian", init_lora_weights="gaussian"),
    lora("random", init_lora_weights=False),
    lora("orthogonal", init_lora_weights="orthogonal"),
    lora("pissa", init_lora_weights="pissa"),
    # PEFT draws the randomised SVD anew at every load, so that its own loads differ from each other.
    lora("pissa-niter", init_lora_weights="pissa_niter_16", tolerance=2e-3, trains=False),
    lora("olora", init_lora_weights="olora"),
    lora("rslora", use_rslora=True),
    lora("dora", use_dora=True),
    lora("bias", lora_bias=True),
    # PEFT trains attention's input bias too and does not save it.
    lora("train-all-biases", bias="all", trains=False),
    lora("train-own-biases", bias="lora_only"),
    lora("dropout", lora_dropout=0.3, trains=False),
    lora("dora-dropout", lora_dropout=0.3, use_dora=True, trains=False),
    lora("patterns", rank_pattern={"lin1": 2}, alpha_pattern={"^lin0": 3}),
    lora("transposed", target_modules=["hf"], fan_in_fan_out=True),
    lora("transposed-dora", target_modules=["hf"], fan_in_fan_out=True, use_dora=True),
    lora("transposed-pissa", target_modules=["hf"], fan_in_fan_out=True, init_lora_weights="pissa"),
    lora("embedding", target_modules=["emb", "lin0"]),
    lora("embedding-dora", target_modules=["emb"], use_dora=True),
    lora("conv", target_modules=["conv1", "conv2", "conv3"], r=2),
    lora("conv-dora", target_modules=["conv1", "conv2", "conv3"], r=2, use_dora=True),
    lora("conv-bias", target_modules=["conv1", "conv2"], r=2, lora_bias=True),
    # PEFT adds the output projection's change twice and sends the gradient through one of them.
    lora("attention", target_modules=["mha"], trains=False),
    lora("experts", target_parameters=["exp.up"], target_modules=[]),
    lora("matrix-parameter", target_parameters=["wide"], target_modules=["lin0"]),
    lora("both-parameters", target_parameters=["exp.up", "exp.wide"], target_modules=["lin0"]),
    lora("modules-to-save", modules_to_save=["head", "norm"]),
    lora("token-rows", trainable_token_indices={"emb": [3, 1, 7]}),
    lora("regex", target_modules=r"lin\d"),
    # PEFT leaves the output projection's adapter out of attention's forward, but merges it.
    lora("exclude", target_modules="all-linear", exclude_modules=["head", "hf"], unmerged=False,
    trains=False),
    lora("llama-default", target_modules=None, model=llama),
    lora("llama-all-linear", target_modules="all-linear", model=llama),
    lora("llama-layers", target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2], model=llama),
    lora("llama-layers-pattern", target_modules=["down_proj"], layers_to_transform=1, layers_pattern="layers",
    model=llama),
    lora("llama-replicated", target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [1, 3]],
    model=llama, merges=False),
    lora("llama-token-rows", target_modules=["q_proj"], trainable_token_indices=[0, 5], model=llama),
    lora("llama-tied-token-rows", target_modules=["q_proj"], trainable_token_indices=[0, 5],
    model=lambda: llama(tied=True)),
    # PEFT merges the change into the weight that both layers share twice.
    lora("llama-tied-embedding", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True,
         model=lambda: llama(tied=True), merges=False, same_targets=False),
    lora("llama-tied-saved", target_modules=["q_proj"], modules_to_save=["embed_tokens"],
    ensure_weight_tying=True,
         model=lambda: llama(tied=True)),
    lora("bert-classifier", target_modules=["query", "value"], task_type="SEQ_CLS", model=bert),
    ia3("outputs", target_modules=["lin0", "lin1"], feedforward_modules=[]),
    ia3("inputs", target_modules=["lin0", "lin1"], feedforward_modules=["lin1"]),
    ia3("transposed", target_modules=["hf"], feedforward_modules=[], fan_in_fan_out=True),
    ia3("conv", target_modules=["conv2", "conv3"], feedforward_modules=["conv3"]),
    Case("ia3-llama-default", "IA3Config", {}, llama),
    oft("linear"),
    oft("empty", model=odd, target_modules=["five", "four"], oft_block_size=2),
    oft("blocks", r=2, oft_block_size=0),
    oft("shared", block_share=True),
    oft("exact", use_cayley_neumann=False),
    oft("constrained", coft=True, eps=1e-2),
    oft("embedding", target_modules=["emb"]),
    # PEFT's own forward disagrees with its merge where a kernel is wider than one.
    oft("conv2d", target_modules=["conv2"], oft_block_size=3, unmerged=False, trains=False),
    oft("train-own-biases", bias="oft_only"),
]  # fmt: skip
