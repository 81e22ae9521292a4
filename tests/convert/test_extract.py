"""The adapter between two models, from memory and from disk, holds what it says it holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import peftrs
from peftrs import (
    AdapterError,
    CheckpointError,
    LoraConfig,
    PeftrsWarning,
    extract_lora,
    set_peft_model_state_dict,
)
from peftrs.convert.extract import Extraction, extract
from tests.convert.test_weighted import ALL, Attending, toy
from tests.model.tiny import fingerprint, llama, logits, shake, stack

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def merged(base: Any, **settings: Any) -> Any:
    model = peftrs.get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    shake(model)
    return model.eval().merge_and_unload()


def applied(base: nn.Module, found: Extraction) -> Any:
    model = peftrs.get_peft_model(copy.deepcopy(base), copy.deepcopy(found.config)).eval()
    report = set_peft_model_state_dict(model, found.tensors)
    assert not report.missing_keys
    assert not report.unexpected_keys
    return model


def near(found: nn.Module, expected: nn.Module, tolerance: float = 1e-5) -> None:
    weights = found.state_dict()
    for name, tensor in expected.state_dict().items():
        assert (weights[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-7, name


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (
            toy,
            {"target_modules": ALL, "target_parameters": ["exp.up", "exp.wide"], "rank_pattern": {"lin0": 2}},
        ),
        (toy, {"target_modules": ["hf"], "fan_in_fan_out": True, "use_rslora": True}),
        (Attending, {"target_modules": ["mha"]}),
        (stack, {"target_modules": ["0", "1"], "lora_bias": True}),
        (llama, {"target_modules": PROJECTIONS}),
        (lambda: llama(tied=True), {"target_modules": PROJECTIONS}),
    ],
    ids=["every kind", "transposed", "attention", "bias", "llama", "llama tied"],
)
def test_a_merged_lora_comes_back(make: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = make().eval()
    after = merged(base, r=3, **settings)
    before = [fingerprint(model) for model in (base, after)]
    found = extract_lora(
        after, base, LoraConfig(r=3, **{**settings, "use_rslora": False, "lora_bias": False})
    )
    assert [fingerprint(model) for model in (base, after)] == before
    assert found.energy > 1 - 1e-6
    assert found.left == found.whole == []
    near(applied(base, found).merge_and_unload(), after)


def test_what_is_kept_is_told_layer_by_layer() -> None:
    base = llama()
    after = merged(base, target_modules=PROJECTIONS, r=6)
    found = extract_lora(after, base, LoraConfig(r=2, target_modules=PROJECTIONS))
    model = applied(base, found)
    for kept in found.layers:
        delta = (
            (after.get_submodule(kept.name).weight - base.get_submodule(kept.name).weight).detach().double()
        )
        values = torch.linalg.svdvals(delta)
        assert kept.rank == 2
        assert kept.norm == pytest.approx(float(delta.norm()))
        assert kept.energy == pytest.approx(float((values[:2] ** 2).sum() / (values**2).sum()), abs=1e-6)
        layer = model.get_base_model().get_submodule(kept.name)
        error = (layer.get_delta_weight("default").detach().double() - delta).norm() ** 2 / delta.norm() ** 2
        assert float(error) == pytest.approx(1 - kept.energy, abs=1e-5)
    assert 0 < found.energy < 1
    assert json.loads(json.dumps(found.to_dict()))["energy"] == found.energy


def test_an_energy_gives_layers_the_ranks_that_they_need() -> None:
    base = llama()
    after = merged(base, target_modules=PROJECTIONS, r=2, rank_pattern={"q_proj": 7})
    found = extract_lora(after, base, LoraConfig(r=16, target_modules="all-linear"), energy=0.99999)
    ranks = {kept.name.rpartition(".")[2]: kept.rank for kept in found.layers}
    assert ranks == {"q_proj": 7, "v_proj": 2, "down_proj": 2}
    assert found.config.rank_pattern == {"q_proj": 7}
    near(applied(base, found).merge_and_unload(), after, 1e-3)


def test_norms_come_along_and_the_rest_is_told() -> None:
    base = llama()
    after = merged(base, target_modules=["q_proj"], r=2)
    with torch.no_grad():
        after.model.norm.weight += 0.1
        after.model.layers[1].input_layernorm.weight += 0.1
        after.model.embed_tokens.weight += 0.1
        after.lm_head.weight += 0.1
    with pytest.warns(
        PeftrsWarning, match=r"1 tensors differ and are not in the adapter: 'model.embed_tokens.weight'"
    ):
        found = extract_lora(
            after, base, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"])
        )
    assert found.whole == ["lm_head", "model.layers.1.input_layernorm", "model.norm"]
    assert found.left == ["model.embed_tokens.weight"]
    with torch.no_grad():
        after.model.embed_tokens.weight -= 0.1
    torch.testing.assert_close(logits(applied(base, found)), logits(after), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("rank", [4, 0.999999], ids=["rank", "energy"])
def test_folders_give_an_adapter_that_both_libraries_load(tmp_path: Path, rank: int | float) -> None:
    base = llama().to(torch.bfloat16)
    after = merged(base, target_modules=PROJECTIONS, r=4, lora_alpha=32)
    with torch.no_grad():
        after.model.norm.weight += 0.25
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    after.save_pretrained(tmp_path / "after")
    found = extract(tmp_path / "base", tmp_path / "after", tmp_path / "out", rank)
    assert found.energy > 0.999
    assert found.whole == ["model.norm"]
    assert (tmp_path / "out" / "README.md").is_file()
    for library in (peftrs, peft):
        loaded: Any = library.PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path / "out")
        weights = loaded.merge_and_unload().state_dict()
        for name, tensor in after.state_dict().items():
            distance = (weights[name].float() - tensor.float()).norm() / tensor.float().norm()
            assert distance < 5e-3, name
    with pytest.raises(AdapterError, match="holds an adapter or a model already"):
        extract(tmp_path / "base", tmp_path / "after", tmp_path / "out", rank)
    assert (
        extract(tmp_path / "base", tmp_path / "after", tmp_path / "out", rank, overwrite=True).to_dict()
        == found.to_dict()
    )


def test_transposed_layers_of_a_folder_are_known_by_the_model_type(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)).eval()
    after = merged(base, target_modules=["c_attn", "c_fc", "wpe"], r=2, fan_in_fan_out=True)
    base.save_pretrained(tmp_path / "base")
    after.save_pretrained(tmp_path / "after")
    found = extract(
        tmp_path / "base", tmp_path / "after", tmp_path / "out", 2, target_modules=["c_attn", "c_fc", "wpe"]
    )
    assert found.config.fan_in_fan_out
    again: Any = peftrs.PeftModel.from_pretrained(base, tmp_path / "out")
    assert again.get_submodule("base_model.model.transformer.wpe").lora_embedding_A["default"].shape == (
        2,
        16,
    )
    near(again.merge_and_unload().transformer, after.transformer)


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, config = stack(), LoraConfig(target_modules=["0", "1"])
    with pytest.raises(AdapterError, match="none of the 2 layers differs"):
        extract_lora(stack(), base, config)
    other = stack()
    other.layers[0] = nn.Linear(8, 4)
    with pytest.raises(
        CheckpointError, match=r"layers.0.weight: has shape \[8, 8\] in base and \[4, 8\] in merged"
    ):
        extract_lora(other, base, config)
    with pytest.raises(AdapterError, match="'merged' has adapters"):
        extract_lora(peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"])), base, config)
    other = stack()
    other.layers[0].weight.data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"layers.0.weight: holds NaN"):
        extract_lora(other, base, config)
    with pytest.raises(AdapterError, match="above 0 and up to 1"):
        extract_lora(other, base, config, energy=2)
    with pytest.raises(AdapterError, match="rank=0 must be"):
        extract(tmp_path, tmp_path, tmp_path / "out", 0)
