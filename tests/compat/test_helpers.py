"""The small helpers do what PEFT's do, and say what they cannot."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import peft.helpers
import peft.utils
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftrs
from peftrs import AdapterError, CheckpointError, ConfigError, LoraConfig, MergeError
from peftrs.compat import helpers, utilities
from peftrs.planning import choose_layers as kappa
from tests.model.tiny import TOKENS, bert, llama, logits, shake

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


def lora(**options: Any) -> Any:
    model = peftrs.get_peft_model(llama(), LoraConfig(**options))
    shake(model)
    return model


def test_signatures_are_those_of_the_model_inside() -> None:
    model = lora()
    expected = logits(model)
    helpers.update_signature(model)
    assert "past_key_values" in inspect.signature(model.forward).parameters
    assert inspect.signature(model.generate) == inspect.signature(model.get_base_model().generate)
    assert torch.equal(logits(model), expected)
    assert model.generate(input_ids=TOKENS, max_new_tokens=2).shape[1] == TOKENS.shape[1] + 2
    with pytest.raises(ValueError, match="is not supported please choose"):
        helpers.update_signature(model, "backward")


def test_what_is_an_adapters_folder(tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    found = [helpers.check_if_peft_model(tmp_path / name) for name in ("adapter", "empty", "nowhere")]
    assert found == [True, False, False]


def test_strength_for_a_while() -> None:
    model, plain = lora(alpha_pattern={"v_proj": 32}), llama()
    expected = logits(model)
    with helpers.rescale_adapter_scale(model, 0.0):
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), expected)
    with pytest.raises(TypeError, match="should be of type float"), helpers.rescale_adapter_scale(model, "2"):  # type: ignore[arg-type]
        pass
    with pytest.raises(AdapterError, match="has a scaling"), helpers.rescale_adapter_scale(plain, 2.0):
        pass
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge them first"), helpers.rescale_adapter_scale(model, 2.0):
        pass
    with helpers.DoraCaching():
        helpers.DoraCaching()(enabled=False)


def test_the_models_own_tensors() -> None:
    plain = bert().state_dict()
    model = peftrs.get_peft_model(
        bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "word_embeddings"])
    )
    own = peftrs.get_base_model_state_dict(model)
    assert own.keys() == plain.keys()
    assert all(torch.equal(own[name], plain[name]) for name in own)
    changed = {name: tensor + 1 for name, tensor in own.items() if tensor.is_floating_point()}
    with pytest.raises(CheckpointError, match="missing"):
        peftrs.set_base_model_state_dict(model, {"classifier.bias": plain["classifier.bias"]})
    with pytest.raises(CheckpointError, match=r"has shape \[1\]"):
        peftrs.set_base_model_state_dict(model, changed | {"classifier.bias": torch.zeros(1)}, strict=False)
    assert torch.equal(peftrs.get_base_model_state_dict(model)["classifier.bias"], plain["classifier.bias"])
    found = peftrs.set_base_model_state_dict(model, {**changed, "other": torch.zeros(1)}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (
        [name for name in own if name not in changed],
        ["other"],
    )
    assert all(
        torch.equal(one, changed[name])
        for name, one in peftrs.get_base_model_state_dict(model).items()
        if name in changed
    )
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge them"):
        peftrs.set_base_model_state_dict(model, plain)


def test_a_prompt_is_not_the_models_own() -> None:
    model = peftrs.get_peft_model(
        llama(), peftrs.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    assert peftrs.get_base_model_state_dict(model).keys() == llama().state_dict().keys()


def test_what_is_trained_is_wide_and_all_else_narrow() -> None:
    model = lora()
    peftrs.cast_mixed_precision_params(model, torch.bfloat16)
    kinds = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_condition_numbers_choose_the_same_layers() -> None:
    model = llama()
    model.experts = nn.Module()
    model.experts.down_proj = nn.Parameter(torch.randn(3, 4, 6))
    theirs, ours = (
        peft.helpers.KappaTuneSelector(model, show_progress=False),
        kappa.KappaTuneSelector(model, show_progress=False),
    )
    for options in ({}, {"top_p": 0.3}, {"num_modules": 2}, {"threshold": 30.0}):
        assert ours.get_best_targets(**options) == theirs.get_best_targets(**options)
        assert ours.get_best_target_parameters(**options) == theirs.get_best_target_parameters(**options)
    found = peftrs.find_kappa_target_modules(model, max_dim_size_to_analyze=40, show_progress=False)
    assert found == peft.find_kappa_target_modules(model, max_dim_size_to_analyze=40, show_progress=False)
    assert found["target_parameters"] == ["experts.down_proj"]


def test_functions_on_tensors_give_what_theirs_give() -> None:
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert torch.equal(peftrs.shift_tokens_right(labels, 0, 2), peft.shift_tokens_right(labels, 0, 2))
    with pytest.raises(ValueError, match="pad_token_id"):
        peftrs.shift_tokens_right(labels, None, 2)  # type: ignore[arg-type]
    cache = torch.randn(4, 2, 3, 5, 6).split(2)
    for one, other in zip(
        peftrs.bloom_model_postprocess_past_key_value(cache),
        peft.bloom_model_postprocess_past_key_value(cache),
        strict=True,
    ):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, other, strict=True))
    weight = torch.randn(3, 4)
    assert utilities.id_tensor_storage(weight) == peft.utils.id_tensor_storage(weight.T)
    assert utilities.infer_device() == peft.utils.infer_device()
    assert (
        utilities._get_batch_size(labels, None) == utilities._get_batch_size(None, torch.zeros(2, 3, 4)) == 2
    )
    assert utilities._get_input_embeddings_name(llama()) == "embed_tokens"
    assert utilities._is_valid_match("a.b", "b")
    assert not utilities._is_valid_match("a.xb", "b")


def test_a_prompts_config_is_filled_in_from_a_models() -> None:
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    config = utilities._prepare_prompt_learning_config(peftrs.PrefixTuningConfig(**options), llama().config)
    other = peft.utils._prepare_prompt_learning_config(
        peft.PrefixTuningConfig(**options), llama().config.to_dict()
    )
    names = ("num_layers", "token_dim", "num_attention_heads", "encoder_hidden_size")
    assert {name: getattr(config, name) for name in names} == {name: getattr(other, name) for name in names}


def devices(cache: Any) -> list[str]:
    keys = [layer.keys for layer in cache.layers] if hasattr(cache, "layers") else cache.key_cache
    return [each.device.type for each in keys]


def test_caches_go_where_their_layers_are() -> None:
    model = peftrs.get_peft_model(
        llama(), peftrs.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    base = model.get_base_model()
    base.hf_device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "meta"}
    assert devices(model.get_prompt(1)) == ["meta", "meta"]
    base.hf_device_map = {}
    cache = model.get_prompt(1)
    base.hf_device_map = {"model.layers.0": "meta"}
    utilities.map_cache_to_layer_device_map(base, cache)
    assert devices(cache) == ["meta", "cpu"]


def test_cartridges_are_put_together_as_theirs(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = peftrs.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2 + seed)
        peftrs.get_peft_model(llama(), config).save_pretrained(tmp_path / name)
    paths = [tmp_path / "one", tmp_path / "two"]
    peftrs.compose_cartridge_adapters(paths, output_path=tmp_path / "ours")
    peft.compose_cartridge_adapters(paths, output_path=tmp_path / "theirs")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert torch.equal(files[0]["prompt_embeddings"], files[1]["prompt_embeddings"])
    model = peftrs.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert model.peft_config["default"].num_virtual_tokens == 5
    torch.testing.assert_close(
        logits(model), logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "theirs"))
    )
    with pytest.raises(ConfigError, match="at least 2"):
        peftrs.compose_cartridge_adapters(paths[:1], output_path=tmp_path / "ours")
    lora().save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="not a cartridge"):
        peftrs.compose_cartridge_adapters([paths[0], tmp_path / "lora"], output_path=tmp_path / "ours")
    with pytest.raises(AdapterError, match="safetensors only"):
        peftrs.compose_cartridge_adapters(paths, output_path=tmp_path / "ours", safe_serialization=False)
