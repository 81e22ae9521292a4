"""Adapters loaded together with the model that they are for; nothing is imported because a file says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftrs
from peftrs import ConfigError, LoraConfig
from tests.model.tiny import bert, llama, logits, shake


def saved(folder: Path, base: Any, task: str | None) -> tuple[Path, torch.Tensor]:
    """An adapter and its base on the disk, and what the two say together."""
    base.save_pretrained(folder / "base")
    model = peftrs.get_peft_model(type(base).from_pretrained(folder / "base"), LoraConfig(task_type=task))
    shake(model)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", logits(model)


def restate(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_task_class_loads_base_and_adapter(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, llama(), "CAUSAL_LM")
    model = peftrs.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert type(model) is peftrs.PeftModelForCausalLM
    assert torch.equal(logits(model), expected)
    trainable = peftrs.AutoPeftModelForCausalLM.from_pretrained(
        folder, adapter_name="mine", is_trainable=True
    )
    assert trainable.active_adapters == ["mine"]
    assert trainable.get_nb_trainable_parameters()[0] > 0


def test_the_head_comes_with_the_adapter(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, bert(), "SEQ_CLS")
    assert torch.equal(
        logits(peftrs.AutoPeftModelForSequenceClassification.from_pretrained(folder)), expected
    )


def test_another_task_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, llama(), "CAUSAL_LM")
    with pytest.raises(ConfigError, match="not AutoPeftModelForSeq2SeqLM"):
        peftrs.AutoPeftModelForSeq2SeqLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match="use AutoPeftModelForCausalLM"):
        peftrs.AutoPeftModel.from_pretrained(folder)


def test_the_class_of_the_base_is_looked_up_not_imported(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, llama(), None)
    assert torch.equal(logits(peftrs.AutoPeftModel.from_pretrained(folder)), expected)
    with pytest.raises(ConfigError, match="only 'diffusers' are looked into"):
        peftrs.AutoPeftModel.from_pretrained(folder, import_allowlist=["diffusers", "planted"])


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("os", "system"),
        ("planted", "Model"),
        ("transformers", "AutoTokenizer"),
        ("transformers.utils.import_utils", "is_torch_available"),
        ("transformers.models.llama.modeling_llama", "__doc__"),
        ("transformers.models.bert.modeling_bert", "LlamaForCausalLM"),
    ],
)
def test_classes_beyond_the_table_are_refused(tmp_path: Path, library: str, name: str) -> None:
    folder, _ = saved(tmp_path, llama(), None)
    restate(folder, auto_mapping={"parent_library": library, "base_model_class": name})
    with pytest.raises(ConfigError, match="auto_mapping"):
        peftrs.AutoPeftModel.from_pretrained(folder)


def test_a_config_that_names_no_base_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, llama(), "CAUSAL_LM")
    restate(folder, base_model_name_or_path=None)
    with pytest.raises(ConfigError, match="which model the adapter is for"):
        peftrs.AutoPeftModelForCausalLM.from_pretrained(folder)
    restate(folder, base_model_name_or_path="x", task_type=None, auto_mapping=None)
    with pytest.raises(ConfigError, match="neither a task nor a class"):
        peftrs.AutoPeftModelForCausalLM.from_pretrained(folder)


def test_auto_classes_are_not_made_by_hand() -> None:
    with pytest.raises(OSError, match=r"AutoPeftModelForCausalLM\.from_pretrained"):
        peftrs.AutoPeftModelForCausalLM()
