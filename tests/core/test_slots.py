"""What a method says of its slots holds: which are trained, which are saved, and of which dtype they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftrs
from peftrs import LoraConfig, PeftModel, registry
from peftrs.bases.kinds import Affine, LayerSpec
from peftrs.core.method import Adapter, Slot, Slots
from peftrs.errors import MismatchError
from peftrs.io.checkpoint import WEIGHTS_NAME as WEIGHTS
from peftrs.methods.lora import Lora

INDICES = {"lora_picked": torch.int16, "lora_order": torch.uint8}


class Picking(Lora):
    """LoRA with indices that are saved beside its factors, and a tensor that is made anew."""

    def slots(self, config: LoraConfig, spec: LayerSpec, values: dict[str, Any]) -> Slots:
        slots = {name: Slot((3,), trained=False, dtype=dtype) for name, dtype in INDICES.items()}
        again = Slot((spec.out_features,), trained=False, saved=False)
        return {**super().slots(config, spec, values), **slots, "lora_again": again}

    def init(self, adapter: Adapter, base: Affine) -> None:
        super().init(adapter, base)
        for name in INDICES:
            adapter[name].copy_(torch.randint(0, 200, (3,)))

    def rebuilt(self, adapter: Adapter, base: Affine) -> dict[str, Tensor]:
        return {"lora_again": base.weight.sum(1)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(registry._methods, "LORA", Picking())
    return tmp_path


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6))


def adapted() -> tuple[PeftModel, Any]:
    model = peftrs.get_peft_model(network(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    return model, model.base_model.model[0].adapters["default"]


def test_indices_are_saved_and_loaded_to_the_bit_and_what_is_made_anew_is_not_in_the_file(
    folder: Path,
) -> None:
    model, adapter = adapted()
    trained = {name.partition(".default")[0] for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {"base_model.model.0.lora_A", "base_model.model.0.lora_B"}
    model.save_pretrained(folder)
    held = load_file(folder / WEIGHTS)
    assert {name.removeprefix("base_model.model.0."): one.dtype for name, one in held.items()} == {
        "lora_A.weight": torch.float32,
        "lora_B.weight": torch.float32,
        **INDICES,
    }
    again = PeftModel.from_pretrained(network(), folder).base_model.model[0].adapters["default"]
    for slot in adapter.kinds:
        assert again[slot].dtype is adapter[slot].dtype
        assert torch.equal(again[slot], adapter[slot]), slot
    assert torch.equal(again["lora_again"], network()[0].weight.sum(1))


@pytest.mark.parametrize(
    ("slot", "dtype"),
    [("lora_picked", torch.float32), ("lora_picked", torch.uint8), ("lora_A.weight", torch.int16)],
)
def test_a_tensor_of_another_dtype_is_refused(folder: Path, slot: str, dtype: torch.dtype) -> None:
    model, adapter = adapted()
    model.save_pretrained(folder)
    held, name = load_file(folder / WEIGHTS), f"base_model.model.0.{slot}"
    save_file(held | {name: held[name].to(dtype)}, folder / WEIGHTS)
    with pytest.raises(MismatchError, match=f"{name}.* is {dtype}, the model needs {adapter[slot].dtype}"):
        PeftModel.from_pretrained(network(), folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_a_dtype_that_files_do_not_hold_is_refused_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setitem(INDICES, "lora_order", dtype)
    model, _ = adapted()
    with pytest.raises(peftrs.AdapterError, match=f"lora_order: cannot save a tensor of {dtype}"):
        model.save_pretrained(folder)
    assert not (folder / WEIGHTS).exists()
