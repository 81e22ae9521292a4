"""State dicts of adapters: which tensors, under which names, whatever the adapters and layers are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftrs
from peftrs import AdapterError, CheckpointError, LoraConfig, PeftrsWarning
from tests.model.tiny import bert, llama, logits, shake, stack

NAMES = ("0", "1", "a", "weight", "lora", "default", "modules_to_save", "layers")


def many(*names: str) -> Any:
    """A model with one adapter of each name, each with other values."""
    model = peftrs.get_peft_model(
        stack(), LoraConfig(target_modules=["0", "1"], modules_to_save=["head"]), names[0]
    )
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(target_modules=["0", "1"], modules_to_save=["head"]))
    for seed, name in enumerate(names):
        model.set_adapter(name)
        shake(model, seed)
    return model


def test_siblings_of_any_name_lose_no_tensors(tmp_path: Path) -> None:
    model = many(*NAMES)
    model.save_pretrained(tmp_path)
    x = torch.ones(1, 8)
    for name in NAMES:
        model.set_adapter(name)
        alone = peftrs.PeftModel.from_pretrained(stack(), tmp_path if name == "default" else tmp_path / name)
        keys = set(peftrs.get_peft_model_state_dict(model, adapter_name=name))
        assert keys == {
            *(f"base_model.model.layers.{layer}.lora_{side}.weight" for layer in "01" for side in "AB"),
            "base_model.model.head.weight",
            "base_model.model.head.bias",
        }
        assert torch.equal(alone(x), model(x))


def test_a_given_state_dict_is_what_is_saved() -> None:
    model = many("a", "b")
    given = {name: torch.full_like(tensor, 7.0) for name, tensor in model.state_dict().items()}
    saved = peftrs.get_peft_model_state_dict(model, given, "b")
    assert set(saved) == set(peftrs.get_peft_model_state_dict(model, adapter_name="b"))
    assert all(bool((tensor == 7).all()) for tensor in saved.values())


@pytest.mark.parametrize("wrapping", ["module.", "_orig_mod.", "_fsdp_wrapped_module."])
def test_names_that_wrappers_change_are_found(wrapping: str) -> None:
    model = many("a")
    given = {wrapping + name: tensor for name, tensor in model.state_dict().items()}
    saved, plain = (peftrs.get_peft_model_state_dict(model, state, "a") for state in (given, None))
    assert set(saved) == set(plain)
    assert all(torch.equal(saved[name], plain[name]) for name in plain)


def test_a_state_dict_that_lacks_tensors_is_refused() -> None:
    model = many("a")
    given = {name: tensor for name, tensor in model.state_dict().items() if ".lora_B." not in name}
    with pytest.raises(AdapterError, match=r"lacks 2 of the adapter's 6 tensors: .*lora_B\.a\.weight"):
        peftrs.get_peft_model_state_dict(model, given, "a")


def test_an_unknown_adapter_is_named() -> None:
    with pytest.raises(AdapterError, match=r"Adapter b not found\. The model has \['a'\]"):
        peftrs.get_peft_model_state_dict(many("a"), adapter_name="b")


def test_a_compiled_model_has_the_same_names() -> None:
    model = many("a")
    compiled = torch.compile(model, backend="eager")
    saved = peftrs.get_peft_model_state_dict(compiled, adapter_name="a", unwrap_compiled=True)  # type: ignore[arg-type]
    assert set(saved) == set(peftrs.get_peft_model_state_dict(model, adapter_name="a"))
    inside = stack()
    inside.layers[0] = torch.compile(inside.layers[0], backend="eager")  # type: ignore[assignment]
    wrapped = peftrs.get_peft_model(inside, LoraConfig(target_modules=["1"], bias="all"))
    assert not any("_orig_mod" in name for name in peftrs.get_peft_model_state_dict(wrapped))


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_bare_model_takes_names_with_and_without_their_prefix(prefix: str) -> None:
    first, second = stack(), stack()
    for model in (first, second):
        peftrs.inject_adapter_in_model(LoraConfig(target_modules=["0"], init_lora_weights=False), model)
    saved = peftrs.get_peft_model_state_dict(first)
    assert set(saved) == {"layers.0.lora_A.weight", "layers.0.lora_B.weight"}
    result = peftrs.set_peft_model_state_dict(
        second, {prefix + name: tensor for name, tensor in saved.items()}
    )
    assert result == ([], [])
    assert torch.equal(first(torch.ones(1, 8)), second(torch.ones(1, 8)))


def test_what_did_not_fit_is_told() -> None:
    model = many("a")
    saved = peftrs.get_peft_model_state_dict(model, adapter_name="a")
    saved["base_model.model.layers.7.lora_A.weight"] = saved.pop("base_model.model.layers.1.lora_A.weight")
    result = peftrs.set_peft_model_state_dict(model, saved, "a")
    assert result.missing_keys == ["base_model.model.layers.1.lora_A.a.weight"]
    assert result.unexpected_keys == ["base_model.model.layers.7.lora_A.weight"]


def test_another_shape_is_refused_or_left_out_as_told() -> None:
    model = many("a")
    saved = peftrs.get_peft_model_state_dict(model, adapter_name="a")
    before = saved["base_model.model.layers.0.lora_A.weight"].clone()
    saved["base_model.model.layers.0.lora_A.weight"] = torch.zeros(3, 8)
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.lora_A\.weight' has shape \[3, 8\], the model needs \[8, 8\]"
    ):
        peftrs.set_peft_model_state_dict(model, saved, "a")
    with pytest.warns(PeftrsWarning, match=r"left out for their shape: .*\[3, 8\]"):
        peftrs.set_peft_model_state_dict(model, saved, "a", ignore_mismatched_sizes=True)
    after = peftrs.get_peft_model_state_dict(model, adapter_name="a")[
        "base_model.model.layers.0.lora_A.weight"
    ]
    assert torch.equal(before, after)


def test_weights_of_the_model_are_never_overwritten_unasked() -> None:
    model = many("a")
    saved = peftrs.get_peft_model_state_dict(model, adapter_name="a")
    saved["base_model.model.layers.0.weight"] = torch.zeros(8, 8)
    with pytest.raises(CheckpointError, match=r"1 would overwrite weights of the model .*layers\.0\.weight"):
        peftrs.set_peft_model_state_dict(model, saved, "a")
    assert bool(model.get_base_model().layers[0].base_layer.weight.any())


def test_biases_are_saved_by_mode() -> None:
    def biases(mode: str) -> set[str]:
        model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"], bias=mode))
        saved = peftrs.get_peft_model_state_dict(model)
        return {name.removeprefix("base_model.model.") for name in saved if name.endswith("bias")}

    assert biases("none") == set()
    assert biases("lora_only") == {"layers.0.base_layer.bias"}
    assert biases("all") == {"layers.0.base_layer.bias", "layers.1.bias", "head.bias"}


def test_embeddings_are_saved_when_they_are_adapted_or_asked_for() -> None:
    plain = peftrs.get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))
    assert not any("embed" in name for name in peftrs.get_peft_model_state_dict(plain))
    asked = set(peftrs.get_peft_model_state_dict(plain, save_embedding_layers=True))
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= asked
    targeted = peftrs.get_peft_model(llama(), LoraConfig(target_modules=["embed_tokens"]))
    assert "base_model.model.model.embed_tokens.base_layer.weight" in peftrs.get_peft_model_state_dict(
        targeted
    )
    assert not any(
        "base_layer" in name
        for name in peftrs.get_peft_model_state_dict(targeted, save_embedding_layers=False)
    )


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens", "lm_head"])
def test_a_resized_vocabulary_is_saved_with_the_adapter(target: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    grown = type(llama()).from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(70, mean_resizing=False)
    model = peftrs.get_peft_model(grown, LoraConfig(task_type="CAUSAL_LM", target_modules=[target]))
    shake(model)
    with pytest.warns(PeftrsWarning, match=r"the vocabulary has 70 tokens, in .* it has 64"):
        model.save_pretrained(tmp_path / "adapter")
    other = type(llama()).from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    other.resize_token_embeddings(70, mean_resizing=False)
    with pytest.warns(PeftrsWarning, match=r"replaces .*(embed_tokens|lm_head)\.weight.* does not adapt"):
        loaded = peftrs.PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_tied_layers_stand_in_files_as_peft_writes_them() -> None:
    rows = peftrs.get_peft_model(
        llama(tied=True), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 5])
    )
    assert [name for name in peftrs.get_peft_model_state_dict(rows) if "token" in name] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    whole = peftrs.get_peft_model_state_dict(peftrs.get_peft_model(llama(tied=True), config))
    assert torch.equal(
        whole["base_model.model.model.embed_tokens.weight"], whole["base_model.model.lm_head.weight"]
    )
    config = LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    both = peftrs.get_peft_model_state_dict(peftrs.get_peft_model(llama(tied=True), config))
    assert torch.equal(
        both["base_model.model.lm_head.lora_B.weight"],
        both["base_model.model.model.embed_tokens.lora_embedding_A"].mT,
    )


def test_a_task_head_is_an_adapters_own(tmp_path: Path) -> None:
    model = peftrs.get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS"))
    shake(model)
    model.save_pretrained(tmp_path)
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= set(
        peftrs.load_peft_weights(tmp_path)
    )
    again = peftrs.PeftModel.from_pretrained(bert(), tmp_path)
    assert isinstance(again, peftrs.PeftModelForSequenceClassification)
    assert torch.equal(logits(again), logits(model))


def test_key_mapping_renames_before_anything_is_compared(tmp_path: Path) -> None:
    class Older(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = stack().layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](self.blocks[0](x))

    model = peftrs.get_peft_model(Older(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="unexpected"):
        peftrs.PeftModel.from_pretrained(stack(), tmp_path)
    loaded = peftrs.PeftModel.from_pretrained(stack(), tmp_path, key_mapping={r"^blocks\.": "layers."})
    old, new = (peftrs.get_peft_model_state_dict(each) for each in (model, loaded))
    assert torch.equal(
        old["base_model.model.blocks.0.lora_A.weight"], new["base_model.model.layers.0.lora_A.weight"]
    )


def test_tensors_alone_go_where_they_are_asked_for_and_those_of_a_model_to_its_layers(tmp_path: Path) -> None:
    peftrs.get_peft_model(llama(), LoraConfig(init_lora_weights=False)).save_pretrained(tmp_path)
    read = peftrs.load_peft_weights(tmp_path)
    away = peftrs.load_peft_weights(tmp_path, device="meta")
    assert {name: (tensor.shape, tensor.device.type) for name, tensor in away.items()} == {
        name: (tensor.shape, "meta") for name, tensor in read.items()
    }
    model = peftrs.get_peft_model(llama(), LoraConfig())
    model.load_adapter(tmp_path, "other", torch_device="meta")
    loaded = peftrs.get_peft_model_state_dict(model, adapter_name="other")
    assert loaded.keys() == read.keys()
    assert all(torch.equal(loaded[name], read[name]) for name in read)
