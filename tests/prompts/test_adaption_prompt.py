"""Adaption prompts: the gate starts shut, adapters are switched, and nothing of it can be merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import peftrs
from peftrs import AdaptionPromptConfig, ConfigError, LoraConfig, MergeError
from tests.prompts.cases import MODELS, TOKENS

models = pytest.mark.parametrize("name", ["llama", "gpt2"])


def adapted(name: str, gate: float | None = None, **options: Any) -> Any:
    torch.manual_seed(4)
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2, **options)
    model = peftrs.get_peft_model(MODELS[name](), config).eval()
    if gate is not None:
        open_gates(model, "default", gate)
    return model


def open_gates(model: Any, adapter: str, gate: float) -> None:
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(f"adaption_gate.{adapter}"):
                parameter.fill_(gate)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@models
def test_a_shut_gate_changes_nothing(name: str) -> None:
    base = logits(MODELS[name]())
    model = adapted(name)
    assert torch.equal(logits(model), base)
    trained = {
        path.rpartition(".")[0].rpartition(".")[2]
        for path, one in model.named_parameters()
        if one.requires_grad
    }
    assert trained == {"adaption_prompt", "adaption_gate"}
    open_gates(model, "default", 0.5)
    assert not torch.allclose(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    cached = model.generate(input_ids=TOKENS, max_new_tokens=5)
    assert torch.equal(cached, model.generate(input_ids=TOKENS, max_new_tokens=5, use_cache=False))
    assert torch.equal(logits(model.unload()), base)


@models
def test_adapters_are_switched_and_stand_beside_others(name: str) -> None:
    model = adapted(name, 0.5)
    first = logits(model)
    model.add_adapter("other", AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1))
    open_gates(model, "other", -0.5)
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    target = "q_proj" if name == "llama" else "c_attn"
    model.add_adapter(
        "lora", LoraConfig(target_modules=[target], init_lora_weights=False, fan_in_fan_out=name == "gpt2")
    )
    model.set_adapter(["other", "lora"])
    assert not torch.allclose(logits(model), second)
    with pytest.raises(MergeError, match="attention reads the prompt"):
        model.merge_adapter()
    model.set_adapter("default")
    model.delete_adapter("lora")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ConfigError, match="the model has 3"):
        peftrs.get_peft_model(MODELS["llama"](), AdaptionPromptConfig(adapter_len=3, adapter_layers=4))
    with pytest.raises(ConfigError, match="adapter_len"):
        peftrs.get_peft_model(MODELS["llama"](), AdaptionPromptConfig(adapter_layers=1))
    with pytest.raises(ConfigError, match="target_modules"):
        peftrs.get_peft_model(MODELS["bert"](), AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
