"""The prompts whose files, outputs, losses and generated texts must agree with PEFT's, on a small model for
each task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

TOKENS = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
LEFT = MASK.flip(1)
TASKS = torch.tensor([0, 1, 0])
LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=40,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GPT2 = GPT2Config(
    n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=64, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
BERT = BertConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, pad_token_id=0,
)  # fmt: skip
BERT_ANSWERS = BertConfig.from_dict(
    {**BERT.to_diff_dict(), "num_labels": 2, "id2label": None, "label2id": None}
)
T5 = T5Config(
    d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, vocab_size=40, dropout_rate=0.0,
    decoder_start_token_id=0,
    pad_token_id=0, eos_token_id=2,
)  # fmt: skip
TYPES = torch.tensor([[0, 0, 0, 1, 1, 1]] * 3)


@dataclass(frozen=True)
class Model:
    """A model of one task, what it is called with, and what else there is to train it with."""

    make: Callable[[], Any]
    task: str
    inputs: dict[str, Tensor]
    labels: dict[str, Tensor]

    def __call__(self) -> Any:
        torch.manual_seed(0)
        return self.make().eval()


TEXT = {"input_ids": TOKENS, "attention_mask": MASK}
PER_TOKEN = {"labels": TOKENS.masked_fill(MASK == 0, -100)}
MODELS = {
    "llama": Model(lambda: LlamaForCausalLM(LLAMA), "CAUSAL_LM", TEXT, PER_TOKEN),
    "gpt2": Model(lambda: GPT2LMHeadModel(GPT2), "CAUSAL_LM", TEXT, PER_TOKEN),
    "t5": Model(
        lambda: T5ForConditionalGeneration(T5), "SEQ_2_SEQ_LM", {**TEXT, "labels": TOKENS[:, :4]}, {}
    ),
    "bert": Model(
        lambda: BertForSequenceClassification(BERT), "SEQ_CLS", {**TEXT, "token_type_ids": TYPES},
        {"labels": torch.tensor([0, 2, 1])},
    ),
    "llama-classifier": Model(
        lambda: LlamaForSequenceClassification(LLAMA), "SEQ_CLS", {"input_ids": TOKENS},
        {"labels": torch.tensor([0, 1, 1])}
    ),
    "bert-tokens": Model(lambda: BertForTokenClassification(BERT), "TOKEN_CLS", TEXT, {"labels": TOKENS % 3}),
    "bert-answers": Model(
        lambda: BertForQuestionAnswering(BERT_ANSWERS), "QUESTION_ANS", TEXT,
        {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 2, 4])},
    ),
    "bert-features": Model(lambda: BertModel(BERT), "FEATURE_EXTRACTION", TEXT, {}),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A config class by name with its arguments, a model by name, what else its calls are given, and what
    PEFT cannot do.
    """

    config: str
    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    trains: bool = True
    """Whether PEFT trains it."""
    generates: bool = True
    """Whether PEFT generates as it trains."""

    @property
    def id(self) -> str:
        settings = [f"{value}" for value in self.arguments.values() if not isinstance(value, list)]
        return "-".join([self.config.removesuffix("Config"), self.model, *settings])

    def configure(self, library: Any, **extra: Any) -> Any:
        """The config, of either library."""
        count = {} if self.config in ("CPTConfig", "AdaptionPromptConfig") else {"num_virtual_tokens": 4}
        return getattr(library, self.config)(
            task_type=MODELS[self.model].task, **count, **self.arguments, **extra
        )


def prompt(model: str, **arguments: Any) -> Case:
    # PEFT gives token classifiers no labels for the virtual tokens.
    return Case("PromptTuningConfig", model, arguments, trains=model != "bert-tokens")


CONTEXT = {
    "cpt_token_ids": [3, 4, 5, 6, 7, 8, 9, 10], "cpt_mask": [1] * 8, "cpt_tokens_type_mask": [1, 2, 3, 4, 5,
    6, 7, 8],
}  # fmt: skip
INPUT_TYPES = torch.tensor([[1, 2, 2, 3, 4, 4]] * 3)
SEVERAL = {"num_tasks": 2, "num_ranks": 2}
CASES = [
    *(prompt(model) for model in MODELS),
    prompt("llama", prompt_tuning_init="SAMPLE_VOCAB"),
    *(Case("PromptEncoderConfig", model, {"encoder_hidden_size": 8},
    trains=model != "bert-tokens") for model in MODELS),
    Case("PromptEncoderConfig", "llama", {"encoder_reparameterization_type": "LSTM",
    "encoder_hidden_size": 8}),
    *(Case("MultitaskPromptTuningConfig", model, SEVERAL, {"task_ids": TASKS}) for model in ("llama", "gpt2",
    "bert")),
    # PEFT's decoder reads the second half of the prompt in training and not when it generates.
    Case("MultitaskPromptTuningConfig", "t5", SEVERAL, {"task_ids": TASKS}, generates=False),
    Case("MultitaskPromptTuningConfig", "t5", {**SEVERAL, "num_transformer_submodules": 1},
    {"task_ids": TASKS}),
    *(Case("PrefixTuningConfig", model) for model in MODELS),
    Case("PrefixTuningConfig", "llama", {"prefix_projection": True, "encoder_hidden_size": 8}),
    Case("PrefixTuningConfig", "t5", {"prefix_projection": True, "encoder_hidden_size": 8}),
    *(Case("CartridgeConfig", model) for model in ("llama", "gpt2", "t5")),
    Case("CartridgeConfig", "llama", {"num_frozen_tokens": 0}),
    Case("AdaptionPromptConfig", "llama", {"adapter_len": 4, "adapter_layers": 2}),
    Case("AdaptionPromptConfig", "gpt2", {"adapter_len": 3, "adapter_layers": 1}),
    Case("CPTConfig", "llama", CONTEXT),
    Case("CPTConfig", "llama", {**CONTEXT, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5},
         {"input_type_mask": INPUT_TYPES}),
]  # fmt: skip
