"""trl over peftrs: supervised tuning, preferences with the adapter turned off as reference, rewards, and
policies.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from tests.ecosystem.tiny import distance, llama, sentences, tokenizer

TOKENS = torch.arange(4, 20).view(2, 8)
TARGETS = ["q_proj", "v_proj"]


def settings(folder: Path, **further: Any) -> dict[str, Any]:
    held = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
    }
    return held | {
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "save_steps": 3,
        **further,
    }


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def base(tmp_path: Path, kind: Any = None) -> str:
    """A model in a folder, as trainers that make references of their own need it."""
    folder = tmp_path / "base"
    model = llama() if kind is None else llama(kind, num_labels=1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def pairs(count: int = 8) -> Dataset:
    rows = sentences(count)
    return Dataset.from_dict(
        {"prompt": [row[:7] for row in rows], "chosen": [" is good"] * count, "rejected": [" is bad"] * count}
    )


def learnt(trainer: Any, fresh: Any, folder: Path) -> None:
    """That the trainer changed the adapter alone, and that its checkpoint gives the same model."""
    model = trainer.model
    assert isinstance(model, PeftModel)
    changed = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert all(bool(value.any()) for value in changed)
    loaded = PeftModel.from_pretrained(fresh, folder / "checkpoint-3")
    assert distance(logits(loaded), logits(model)) < 1e-5


def test_supervised_tuning(tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": row}, {"role": "assistant", "content": "the cat is good"}]
        for row in sentences()
    ]
    trainer = SFTTrainer(
        model=base(tmp_path),
        args=SFTConfig(
            **settings(
                tmp_path, max_length=32, gradient_checkpointing=True, eval_strategy="steps", eval_steps=3
            )
        ),
        train_dataset=Dataset.from_dict({"messages": chats}),
        eval_dataset=Dataset.from_dict({"messages": chats[:4]}),
        peft_config=LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    learnt(trainer, llama(), tmp_path)


def test_supervised_tuning_of_a_model_that_has_an_adapter(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    rows = Dataset.from_dict({"text": sentences()})
    arguments = SFTConfig(**settings(tmp_path, max_length=32))
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer())
    trainer.train()
    learnt(trainer, llama(), tmp_path)


def test_preferences(tmp_path: Path) -> None:
    trainer = DPOTrainer(
        model=base(tmp_path),
        args=DPOConfig(**settings(tmp_path, max_length=32)),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    assert trainer.ref_model is None
    seen = []
    inside = trainer.model.disable_adapter

    def watched() -> Any:
        seen.append(None)
        return inside()

    trainer.model.disable_adapter = watched
    trainer.train()
    # The model without its adapter is the reference: at the first step both say the same, which makes the
    # loss log 2.
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]
    assert seen
    del trainer.model.disable_adapter
    learnt(trainer, llama(), tmp_path)


def test_preferences_of_a_model_that_has_an_adapter(tmp_path: Path) -> None:
    """The reference is then the adapter as it was: trl keeps a frozen copy of it under the name "ref"."""
    model = get_peft_model(
        llama(), LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
    )
    before = logits(model)
    arguments = DPOConfig(**settings(tmp_path, max_length=32))
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=pairs(), processing_class=tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert model.active_adapters == ["default"]
    if "ref" in model.peft_config:
        model.set_adapter("ref")
        assert torch.equal(logits(model), before)


def test_rewards(tmp_path: Path) -> None:
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            base(tmp_path, LlamaForSequenceClassification), num_labels=1
        ),
        args=RewardConfig(**settings(tmp_path, max_length=32)),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=TARGETS, task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    learnt(trainer, llama(LlamaForSequenceClassification, num_labels=1), tmp_path)


def test_policies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)

    def lengths(completions: list[str], **further: Any) -> list[float]:
        return [float(len(one)) for one in completions]

    trainer = GRPOTrainer(
        model=base(tmp_path),
        reward_funcs=lengths,
        args=GRPOConfig(**settings(tmp_path, max_completion_length=6, num_generations=4, beta=0.1)),
        train_dataset=Dataset.from_dict({"prompt": sentences(8)}),
        peft_config=LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert trainer.state.global_step == 3
    learnt(trainer, llama(), tmp_path)
