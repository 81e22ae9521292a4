"""sentence-transformers over peftrs: an adapter of an encoder, trained, saved, loaded and taken off again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from transformers import BertForSequenceClassification

from tests.ecosystem.tiny import bert, sentences, tokenizer


@pytest.fixture
def base(tmp_path: Path) -> str:
    folder = tmp_path / "base"
    bert().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def test_an_encoders_adapter(base: str, tmp_path: Path) -> None:
    model = SentenceTransformer(base, device="cpu")
    plain = model.encode(sentences(4))
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    assert np.array_equal(model.encode(sentences(4)), plain)
    rows = {"sentence1": sentences(), "sentence2": sentences()[::-1], "score": [n % 2 / 1 for n in range(16)]}
    options = {
        "max_steps": 4,
        "learning_rate": 5e-2,
        "per_device_train_batch_size": 8,
        "save_steps": 4,
        "logging_steps": 1,
    }
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            str(tmp_path / "out"), report_to=[], use_cpu=True, disable_tqdm=True, **options
        ),
        train_dataset=Dataset.from_dict(rows),
        loss=losses.CosineSimilarityLoss(model),
    )
    trainer.train()
    told = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert told[-1] < told[0]
    trained = model.encode(sentences(4))
    assert np.abs(trained - plain).max() > 1e-3
    model.save_pretrained(str(tmp_path / "adapter"))
    assert list((tmp_path / "adapter").rglob("adapter_model.safetensors"))
    assert not list((tmp_path / "adapter").rglob("model.safetensors"))
    loaded = SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    assert np.abs(loaded.encode(sentences(4)) - trained).max() < 1e-5
    resumed: Any = SentenceTransformer(str(tmp_path / "out" / "checkpoint-4"), device="cpu")
    assert np.abs(resumed.encode(sentences(4)) - trained).max() < 1e-5
    other = SentenceTransformer(base, device="cpu")
    other.load_adapter(str(tmp_path / "adapter"), "taken")
    assert other.active_adapters() == ["taken"]
    assert np.abs(other.encode(sentences(4)) - trained).max() < 1e-5
    other.disable_adapters()
    assert np.array_equal(other.encode(sentences(4)), plain)
    other.enable_adapters()
    other.delete_adapter("taken")
    assert np.array_equal(other.encode(sentences(4)), plain)


def test_a_cross_encoder_with_its_head(tmp_path: Path) -> None:
    bert(BertForSequenceClassification, num_labels=1).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    model = CrossEncoder(str(tmp_path / "base"), device="cpu")
    pairs = list(zip(sentences(4), sentences(4)[::-1], strict=True))
    plain = model.predict(pairs)
    model.model.add_adapter(
        LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    )
    with torch.no_grad():
        model.model.classifier.modules_to_save["default"].bias += 0.5
    changed = model.predict(pairs)
    assert np.abs(changed - plain).max() > 1e-3
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert np.abs(loaded.predict(pairs) - changed).max() < 1e-5
