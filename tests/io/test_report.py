"""Loading tells what became of every tensor, refuses what does not fit, and is never silent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftrs
from peftrs import CheckpointError, LoraConfig, PeftrsWarning, set_strict
from tests.model.tiny import fingerprint, llama, logits, shake

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = peftrs.get_peft_model(llama(), LoraConfig(r=4))
    shake(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> Tensors:
    file = folder / "adapter_model.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, file)
    return tensors


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor.clone() for name, tensor in tensors.items()}


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "one renamed": (
        renamed(FIRST, FIRST.replace("q_proj", "q_porj")),
        r"q_porj.*nearest in the model: '.*layers.0.*q_proj",
    ),
    "one more": (
        lambda tensors: tensors | {"base_model.model.more.lora_A.weight": torch.ones(2)},
        "1 unexpected: '.*more",
    ),
    "one missing": (
        lambda tensors: {name: one for name, one in tensors.items() if name != FIRST},
        f"1 missing: '{FIRST}'",
    ),
    "another shape": (
        lambda tensors: tensors | {FIRST: torch.ones(3, 32)},
        r"shape \[3, 32\], the model needs \[4, 32\]",
    ),
    "no numbers": (
        lambda tensors: tensors | {FIRST: torch.full((4, 32), torch.nan)},
        f"NaN or infinite values: '{FIRST}'",
    ),
    "infinite": (
        lambda tensors: tensors | {FIRST: torch.full((4, 32), -torch.inf)},
        "NaN or infinite values",
    ),
    "a prefix more": (
        renamed("model.layers", "language_model.model.layers"),
        r"key_mapping={'\^language_model\\.': ''}",
    ),
    "a prefix less": (renamed("model.model.layers", "model.layers"), r"key_mapping={'\^': 'model.'}"),
    "another model's": (
        lambda tensors: {f"x.{at}.lora_A.weight": one for at, one in enumerate(tensors.values())},
        "none of them",
    ),
}
LENIENT = ["one renamed", "one more", "one missing", "no numbers", "infinite"]


def load(way: str, base: Any, folder: Path, strict: bool | None) -> None:
    if way == "load_adapter":
        base.load_adapter(folder, "other", strict=strict)
    else:
        peftrs.PeftModel.from_pretrained(base, folder, strict=strict)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter"])
def test_what_does_not_fit_is_refused(fault: str, way: str, folder: Path) -> None:
    change, message = FAULTS[fault]
    edit(folder, change)
    base: Any = llama()
    if way == "load_adapter":
        base = peftrs.get_peft_model(base, LoraConfig(r=2))
    before = fingerprint(base)
    for strict in (None, True):
        with pytest.raises(CheckpointError, match=message):
            load(way, base, folder, strict)
        assert fingerprint(base) == before


@pytest.mark.parametrize("fault", FAULTS)
def test_leniently_it_is_warned_of_and_told(fault: str, folder: Path) -> None:
    change, message = FAULTS[fault]
    tensors = edit(folder, change)
    model = peftrs.get_peft_model(llama(), LoraConfig(r=2))
    if fault not in LENIENT:
        with pytest.raises(CheckpointError):
            model.load_adapter(folder, "other", strict="warn")
        return
    with pytest.warns(PeftrsWarning, match=message):
        report = model.load_adapter(folder, "other", strict="warn")
    assert sorted([*report.used, *report.remapped, *report.unused]) == sorted(tensors)
    assert report is model.load_reports["other"]
    assert len(report.missing_keys) == (fault in ("one renamed", "one missing"))
    assert len(report.unused) == len(report.unexpected_keys) == (fault in ("one renamed", "one more"))


def test_a_lenient_process_warns_even_of_another_models_file(folder: Path) -> None:
    edit(folder, FAULTS["another model's"][0])
    set_strict(False)
    try:
        with pytest.warns(PeftrsWarning, match="unexpected"):
            peftrs.PeftModel.from_pretrained(llama(), folder)
    finally:
        set_strict(True)


def test_all_is_used_where_all_fits(folder: Path) -> None:
    model = peftrs.PeftModel.from_pretrained(llama(), folder)
    report = model.load_reports["default"]
    assert sorted(report.used) == sorted(load_file(folder / "adapter_model.safetensors"))
    assert (report.remapped, report.unused, tuple(report)) == ({}, [], ([], []))


def test_other_names_are_told_with_their_own(folder: Path) -> None:
    expected = logits(peftrs.PeftModel.from_pretrained(llama(), folder))
    tensors = edit(folder, renamed("model.layers", "old.layers"))
    model = peftrs.PeftModel.from_pretrained(llama(), folder, key_mapping={"^old": "model"})
    assert torch.equal(logits(model), expected)
    report = model.load_reports["default"]
    assert report.remapped == {name: name.replace("old.layers", "model.layers") for name in tensors}
    state = {
        name.removeprefix("base_model.model."): one
        for name, one in load_file(folder / "adapter_model.safetensors").items()
    }
    state = {name.replace("old.", "model."): one for name, one in state.items()}
    found: Any = peftrs.set_peft_model_state_dict(model, state)
    assert set(found.remapped) == set(state)


def test_the_hint_for_a_prefix_is_right(folder: Path) -> None:
    expected = logits(peftrs.PeftModel.from_pretrained(llama(), folder))
    edit(folder, renamed("model.layers", "language_model.model.layers"))
    model = peftrs.PeftModel.from_pretrained(llama(), folder, key_mapping={r"^language_model\.": ""})
    assert torch.equal(logits(model), expected)
