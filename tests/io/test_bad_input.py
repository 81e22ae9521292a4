"""Every way in which an adapter's folder can be wrong: one error that names the file and the reason, and
nothing changed.
"""

from __future__ import annotations

import re
import struct
import sys
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import peftrs
from peftrs import CheckpointError, LoraConfig, PeftModel, PeftrsError, PeftrsWarning
from tests.io.faults import CASES, CONFIG, LAYER, WEIGHTS, A, Change, config, rename, tensors
from tests.model.tiny import fingerprint, shake, stack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter."""
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0", "1"], r=4))
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "file", "reason"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_one_error_says_which_file_and_why(folder: Path, change: Change, file: str, reason: str) -> None:
    change(folder)
    model = stack()
    before = fingerprint(model)
    start = time.monotonic()
    with pytest.raises(PeftrsError) as caught:
        PeftModel.from_pretrained(model, folder)
    message = str(caught.value)
    assert file in message
    assert re.search(reason, message), message
    assert message.isprintable(), message
    assert len(message) < 600, message
    assert time.monotonic() - start < 5
    assert fingerprint(model) == before
    assert not hasattr(model, "peft_config")
    assert isinstance(caught.value, ValueError | OSError)


def test_the_same_faults_leave_a_model_with_adapters_as_it_was(folder: Path) -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["1"]), "first")
    before, x = fingerprint(model), torch.ones(1, 8)
    expected = model(x)
    tensors(lambda held: held.pop(A))(folder)
    with pytest.raises(PeftrsError, match="missing"):
        model.load_adapter(folder, "second")
    assert fingerprint(model) == before
    assert list(model.peft_config) == model.active_adapters == ["first"]
    assert torch.equal(model(x), expected)


def test_lenient_loading_warns_with_the_same_words(folder: Path) -> None:
    tensors(lambda held: rename(held, A, A.replace(".0.", ".9.")))(folder)
    with pytest.warns(
        PeftrsWarning, match=r"1 missing: .*layers\.0\.lora_A.*; 1 unexpected: .*layers\.9\.lora_A"
    ):
        model = PeftModel.from_pretrained(stack(), folder, strict=False)
    held = dict(model.named_parameters())
    started = held["base_model.model.layers.0.lora_A.default.weight"]
    assert started.device.type == "cpu"
    assert bool(started.any()), "a missing tensor starts as the method starts it"
    loaded = load_file(folder / WEIGHTS)[f"{LAYER}.lora_B.weight"]
    assert torch.equal(held["base_model.model.layers.0.lora_B.default.weight"], loaded)


def test_weights_of_the_model_are_refused_leniently_too(folder: Path) -> None:
    tensors(lambda held: held.update({"base_model.model.head.weight": torch.zeros(2, 8)}))(folder)
    with pytest.raises(PeftrsError, match="would overwrite"):
        PeftModel.from_pretrained(stack(), folder, strict=False)


def test_countless_tensors_are_refused_before_any_is_looked_at(folder: Path) -> None:
    rows = (
        f'"{place}":{{"dtype":"F16","shape":[1],"data_offsets":[{2 * place},{2 * place + 2}]}}'
        for place in range(100_005)
    )
    text = ("{" + ",".join(rows) + "}").encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(2 * 100_005))
    model = stack()
    tracemalloc.start()
    with pytest.raises(
        PeftrsError, match=rf"{WEIGHTS}: holds 100005 tensors, adapter 'default' has 4 on this model"
    ):
        PeftModel.from_pretrained(model, folder, strict=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(folder: Path, value: float) -> None:
    tensors(lambda held: held[A].__setitem__((0, 0), value))(folder)
    message = r"1 tensors hold NaN or infinite values: '.*layers\.0\.lora_A\.weight'"
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(stack(), folder)
    with pytest.warns(PeftrsWarning, match=message):
        model = PeftModel.from_pretrained(stack(), folder, strict=False)
    with pytest.raises(peftrs.MergeError, match="NaN"):
        model.merge_and_unload()


def test_names_out_of_files_cannot_write_on_the_terminal(folder: Path) -> None:
    tensors(lambda held: held.update({"\x1b[2J\r\n" + "x" * 100_000: torch.zeros(2)}))(folder)
    with pytest.raises(PeftrsError) as caught:
        PeftModel.from_pretrained(stack(), folder)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../up", "a.b", "nul\0", " a", "items", "__base__"])
def test_adapter_names_are_one_plain_component(folder: Path, name: str) -> None:
    with pytest.raises(PeftrsError, match="name"):
        PeftModel.from_pretrained(stack(), folder, adapter_name=name)


def test_nothing_that_a_config_names_is_imported_or_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('a config made us import this')")
    monkeypatch.syspath_prepend(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    config(
        auto_mapping={"base_model_class": "Model", "parent_library": "planted"},
        megatron_core="planted",
        base_model_name_or_path=str(secret),
        tokenizer_name_or_path=str(secret),
    )(folder)
    opened: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("open", "import"):
            opened.append(str(arguments[0]))

    watching = True
    sys.addaudithook(watch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftrsWarning)
        PeftModel.from_pretrained(stack(), folder)
        with pytest.raises(PeftrsError, match="planted"):
            peftrs.AutoPeftModel.from_pretrained(folder)
    watching = False
    assert not [name for name in opened if "planted" in name or "secret" in name]


def test_a_key_of_a_config_that_occurs_twice_is_named(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"r": 4', '"r": 5, "\\u0072": 4'))
    with pytest.warns(PeftrsWarning, match=r"adapter_config\.json: .*`r` occurs twice"):
        PeftModel.from_pretrained(stack(), folder)


def test_a_negative_strength_is_told_of_and_works(folder: Path) -> None:
    config(lora_alpha=-8)(folder)
    with pytest.warns(PeftrsWarning, match="alpha is negative"):
        model = PeftModel.from_pretrained(stack(), folder)
    assert model.base_model.model.layers[0].scaling["default"] == -2


def test_an_update_that_overflows_is_not_merged(folder: Path) -> None:
    config(lora_alpha=1e38)(folder)
    tensors(lambda held: [value.mul_(1e3) for value in held.values()])(folder)
    model = PeftModel.from_pretrained(stack(), folder)
    before = fingerprint(model)
    with pytest.raises(peftrs.MergeError, match=r"layers\.0"):
        model.merge_adapter()
    assert fingerprint(model) == before


def test_a_folder_without_weights_is_not_completed_from_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)
    monkeypatch.chdir(tmp_path)
    (folder / WEIGHTS).unlink()
    for path in (folder, "adapter", "./adapter"):
        with pytest.raises(PeftrsError, match=f"holds no {WEIGHTS}"):
            PeftModel.from_pretrained(stack(), path)


def test_names_in_configs_cannot_write_on_the_terminal(folder: Path) -> None:
    config(target_modules=["\x1b[2J\r\n" + "x" * 1_000_000])(folder)
    with pytest.raises(PeftrsError) as caught:
        PeftModel.from_pretrained(stack(), folder)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600


def test_unknown_keys_of_a_config_are_named_and_left_out(folder: Path) -> None:
    config(from_the_future=1)(folder)
    with pytest.warns(PeftrsWarning, match=r"adapter_config\.json: unknown keys \['from_the_future'\]"):
        PeftModel.from_pretrained(stack(), folder)


def test_a_save_that_was_cut_short_is_noticed(folder: Path) -> None:
    kept = (folder / CONFIG).read_text()
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0", "1"], r=4, lora_alpha=32))
    model.save_pretrained(folder)
    (folder / CONFIG).rename(folder / f"{CONFIG}.tmp-0123456789")
    (folder / CONFIG).write_text(kept)
    with pytest.raises(PeftrsError, match="cut short"):
        PeftModel.from_pretrained(stack(), folder)
