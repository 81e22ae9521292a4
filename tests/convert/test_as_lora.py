"""Adapters of every kind become LoRAs that change the model nearly as they do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftrs
from peftrs import (
    AdapterError,
    IA3Config,
    LoraConfig,
    OFTConfig,
    convert_to_lora,
    save_as_lora,
    set_peft_model_state_dict,
)
from peftrs.core.tree import adapted_layers
from tests.convert.test_weighted import ALL, Attending, toy
from tests.model.tiny import fingerprint, llama, logits, shake, stack

TWO = ["0", "1"]
SOURCES: dict[str, tuple[Any, Any]] = {
    "lora": (stack, LoraConfig(target_modules=TWO, r=3, lora_alpha=5, use_rslora=True)),
    "lora bias": (stack, LoraConfig(target_modules=TWO, r=3, lora_bias=True)),
    "lora everywhere": (toy, LoraConfig(target_modules=ALL, target_parameters=["exp.up", "exp.wide"], r=3)),
    "attention": (Attending, LoraConfig(target_modules=["mha"], r=3)),
    "dora": (stack, LoraConfig(target_modules=TWO, r=2, use_dora=True)),
    "pissa": (stack, LoraConfig(target_modules=TWO, r=2, init_lora_weights="pissa")),
    "ia3": (stack, IA3Config(target_modules=TWO, feedforward_modules=["1"])),
    "oft": (stack, OFTConfig(target_modules=TWO, oft_block_size=4)),
    "whole": (stack, LoraConfig(target_modules=["0"], r=2, modules_to_save=["head"])),
}


def adapted(source: str) -> tuple[Any, Any]:
    make, config = SOURCES[source]
    model = peftrs.get_peft_model(make().eval(), copy.deepcopy(config)).eval()
    shake(model)
    torch.manual_seed(1)
    inputs = {toy: torch.arange(12).view(2, 6), Attending: torch.randn(2, 3, 8)}.get(make, torch.randn(5, 8))
    return model, inputs


def loaded(model: Any, config: Any, tensors: Any) -> Any:
    model.add_adapter("again", config)
    report = set_peft_model_state_dict(model, tensors, "again")
    assert not report.missing_keys
    assert not report.unexpected_keys
    model.set_adapter("again")
    return model


@pytest.mark.parametrize("rank", [8, 1.0], ids=["rank", "energy"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_lora_of_full_rank_does_the_same(source: str, rank: int | float) -> None:
    torch.manual_seed(0)
    model, inputs = adapted(source)
    before, state, expected = fingerprint(model), list(model.state_dict()), model(inputs)
    config, tensors = convert_to_lora(model, rank)
    assert fingerprint(model) == before
    assert list(model.state_dict()) == state
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert all(name.startswith("base_model.model.") for name in tensors)
    assert config.lora_alpha == config.r
    torch.testing.assert_close(loaded(model, config, tensors)(inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["dora", "ia3", "oft", "lora"])
def test_an_energy_is_kept_by_the_smallest_ranks(source: str) -> None:
    model, _ = adapted(source)
    config, tensors = convert_to_lora(model, 0.9)
    wanted = {}
    for layer in adapted_layers(model):
        delta = layer.get_delta_weight("default").detach()
        parts = torch.linalg.svdvals(delta).square().cumsum(0)
        wanted[layer.spec.name] = 1 + int((parts < 0.9 * parts[-1]).sum())
    again = loaded(model, config, tensors)
    assert {layer.spec.name: layer.r["again"] for layer in adapted_layers(again)} == wanted


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_ranks_and_changes_are_theirs(tmp_path: Path) -> None:
    model = peftrs.get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "up_proj"], r=6))
    shake(model)
    model.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(llama(), tmp_path)
    for rank in (2, 0.8):
        config, tensors = convert_to_lora(model, rank)
        other, expected = peft.convert_to_lora(theirs, rank)
        assert tensors.keys() == expected.keys()
        for name in tensors:
            if name.endswith("lora_A.weight"):
                up = name.replace("lora_A", "lora_B")
                assert tensors[name].shape == expected[name].shape
                torch.testing.assert_close(
                    tensors[up] @ tensors[name], expected[up] @ expected[name], rtol=1e-4, atol=1e-6
                )
    assert config.task_type == other.task_type


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("source", ["dora", "oft", "whole"])
def test_the_folder_is_any_other_adapters(source: str, tmp_path: Path) -> None:
    model, inputs = adapted(source)
    expected = model(inputs)
    save_as_lora(tmp_path, model, 8)
    for library in (peftrs, peft):
        again: Any = library.PeftModel.from_pretrained(SOURCES[source][0](), tmp_path).eval()
        torch.testing.assert_close(again(inputs), expected, rtol=1e-5, atol=1e-6)


def test_a_merged_adapter_is_converted_as_it_is() -> None:
    model, inputs = adapted("oft")
    _, tensors = convert_to_lora(model, 8)
    expected = model(inputs)
    model.merge_adapter()
    after = convert_to_lora(model, 8)
    assert all(torch.equal(tensor, after[1][name]) for name, tensor in tensors.items())
    model.unmerge_adapter()
    torch.testing.assert_close(loaded(model, *after)(inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "rank", "words"),
    [
        (LoraConfig(target_modules=["0"]), 0, "rank=0 must be a positive integer"),
        (LoraConfig(target_modules=["0"]), 1.5, "above 0 and up to 1"),
        (LoraConfig(target_modules=["0"], bias="all"), 2, "trains biases of the base"),
    ],
)
def test_what_cannot_be_converted_is_refused(config: Any, rank: Any, words: str) -> None:
    model = peftrs.get_peft_model(stack(), copy.deepcopy(config))
    with pytest.raises(AdapterError, match=words):
        convert_to_lora(model, rank)
    with pytest.raises(AdapterError, match="Adapter other not found"):
        convert_to_lora(model, 2, "other")


def test_token_rows_and_groups_are_refused() -> None:
    model = peftrs.get_peft_model(
        llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    )
    with pytest.raises(AdapterError, match=r"embed_tokens: trained token rows"):
        convert_to_lora(model, 2)
    model = peftrs.get_peft_model(
        nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), LoraConfig(target_modules=["0"], r=2)
    )
    with pytest.raises(AdapterError, match="2 groups of channels"):
        convert_to_lora(model, 2)


def test_an_injected_model_is_converted_too() -> None:
    model = peftrs.get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    shake(model)
    bare = model.get_base_model()
    _, tensors = convert_to_lora(bare, 8)
    _, expected = convert_to_lora(model, 8)
    assert tensors.keys() == expected.keys()
    assert torch.equal(logits(bare), logits(model))
