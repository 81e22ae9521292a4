"""Folders of adapters: what is written where, by whom, and what comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftrs
from peftrs import AdapterError, CheckpointError, LoraConfig, PeftModel
from tests.model.tiny import llama, logits, shake, stack

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def two() -> Any:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"]))
    model.add_adapter("other", LoraConfig(target_modules=["1"]))
    return model


def test_default_is_the_folder_and_others_lie_in_it(tmp_path: Path) -> None:
    two().save_pretrained(tmp_path)
    assert listing(tmp_path) == [*FILES, "other/adapter_config.json", "other/adapter_model.safetensors"]


def test_selected_adapters_alone_are_written(tmp_path: Path) -> None:
    two().save_pretrained(tmp_path, selected_adapters=["other"])
    assert listing(tmp_path) == ["README.md", "other/adapter_config.json", "other/adapter_model.safetensors"]
    with pytest.raises(AdapterError, match=r"\['nope'\] are not among \['default', 'other'\]"):
        two().save_pretrained(tmp_path, selected_adapters=["nope"])


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    two().save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_pickles_are_not_written_nor_files_replaced_by_folders(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="safetensors only"):
        two().save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match="is a file"):
        two().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_config_says_what_the_adapter_is_for(tmp_path: Path) -> None:
    model = two()
    model.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stated["inference_mode"] is True
    assert stated["auto_mapping"] == {"base_model_class": "Stack", "parent_library": "tests.model.tiny"}
    assert model.peft_config["default"].inference_mode is False
    assert model.peft_config["default"].auto_mapping is None


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    model = two()
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    for file in listing(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_tensors_that_share_memory_or_are_strided_are_written_as_they_read(tmp_path: Path) -> None:
    model = two()
    state = model.state_dict()
    whole = torch.randn(8, 16)
    state["base_model.model.layers.0.lora_A.default.weight"] = whole[:, ::2]
    state["base_model.model.layers.0.lora_B.default.weight"] = whole[:, :8].mT
    model.save_pretrained(tmp_path, state_dict=state, selected_adapters=["default"])
    written = peftrs.load_peft_weights(tmp_path)
    assert torch.equal(written["base_model.model.layers.0.lora_A.weight"], whole[:, ::2])
    assert torch.equal(written["base_model.model.layers.0.lora_B.weight"], whole[:, :8].mT)


def test_tensors_without_values_are_not_saved(tmp_path: Path) -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"]), low_cpu_mem_usage=True)
    with pytest.raises(AdapterError, match=r"lora_A\.weight has no values instead of"):
        model.save_pretrained(tmp_path)
    assert not listing(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = peftrs.get_peft_model(
        stack().to(dtype), LoraConfig(target_modules=["0"]), autocast_adapter_dtype=False
    )
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stack().to(dtype), tmp_path, autocast_adapter_dtype=False)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_a_loaded_adapter_is_trained_only_if_asked(tmp_path: Path) -> None:
    two().save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(stack(), tmp_path)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trainable = PeftModel.from_pretrained(stack(), tmp_path, is_trainable=True)
    assert [name for name, parameter in trainable.named_parameters() if parameter.requires_grad]
    assert trainable.peft_config["default"].inference_mode is False


def test_adapters_are_loaded_beside_others_and_over_themselves(tmp_path: Path) -> None:
    model = two()
    shake(model)
    model.save_pretrained(tmp_path)
    other = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"], r=2), "mine")
    assert other.load_adapter(tmp_path, "theirs") == ([], [])
    assert other.active_adapters == ["mine"]
    other.set_adapter("theirs")
    x = torch.ones(1, 8)
    assert torch.equal(other(x), model.eval()(x))
    shake(other)
    assert not torch.equal(other(x), model(x))
    other.load_adapter(tmp_path, "theirs", is_trainable=True)
    assert torch.equal(other(x), model(x))
    assert other.get_base_model().layers[0].lora_A["theirs"].weight.requires_grad


def test_a_config_can_be_given_instead_of_the_files(tmp_path: Path) -> None:
    two().save_pretrained(tmp_path)
    config = LoraConfig(target_modules=["0"], lora_alpha=64)
    model = PeftModel.from_pretrained(stack(), tmp_path, config=config)
    assert model.get_base_model().layers[0].scaling["default"] == 8
    assert config.inference_mode is True
    with pytest.raises(AdapterError, match="must be a PeftConfig, got dict"):
        PeftModel.from_pretrained(stack(), tmp_path, config={"r": 8})  # type: ignore[arg-type]


@pytest.mark.parametrize(("init", "rslora"), [("pissa", False), ("olora", False), ("pissa", True)])
def test_an_adapter_that_started_from_the_weights_becomes_a_plain_one(
    tmp_path: Path, init: str, rslora: bool
) -> None:
    config = LoraConfig(r=4, init_lora_weights=init, use_rslora=rslora, task_type="CAUSAL_LM")
    model = peftrs.get_peft_model(llama(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    shake(model)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    stated = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (stated["r"], stated["init_lora_weights"]) == (8, True)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "plain")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert model.peft_config["default"].r == 4


def test_what_cannot_become_plain_is_refused(tmp_path: Path) -> None:
    def save(config: LoraConfig, initial: str = "initial") -> None:
        peftrs.get_peft_model(stack(), config).save_pretrained(
            tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / initial)
        )

    peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"], r=4)).save_pretrained(
        tmp_path / "initial"
    )
    peftrs.get_peft_model(
        stack(), LoraConfig(target_modules=["0"], init_lora_weights="olora")
    ).save_pretrained(tmp_path / "olora")
    with pytest.raises(AdapterError, match="needs no initial model"):
        save(LoraConfig(target_modules=["0"]))
    with pytest.raises(AdapterError, match="it must be True there"):
        save(LoraConfig(target_modules=["0"], init_lora_weights="olora"), "olora")
    with pytest.raises(AdapterError, match="use_rslora"):
        save(
            LoraConfig(
                target_modules=["0"], init_lora_weights="olora", use_rslora=True, alpha_pattern={"0": 2}
            )
        )
    with pytest.raises(CheckpointError, match="not this adapter before training"):
        save(LoraConfig(target_modules=["0"], r=2, init_lora_weights="olora"))
    assert not (tmp_path / "out").exists()
