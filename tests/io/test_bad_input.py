"""Every way in which an adapter's folder can be wrong: one error that names the file and the reason, and nothing changed."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftrs
from peftrs import CheckpointError, LoraConfig, PeftModel, PeftrsError, PeftrsWarning
from tests.model.tiny import fingerprint, shake, stack

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.layers.0"

Change = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter."""
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0", "1"], r=4))
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """Changes the tensors and leaves the format intact."""

    def apply(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def header(change: Callable[[str], str]) -> Change:
    """Changes the text of the header and leaves the tensors' bytes as they are."""

    def apply(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        text = change(data[8 : 8 + length].decode()).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def raw(change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def bytes_only(data: bytes) -> Change:
    return lambda folder: (folder / WEIGHTS).write_bytes(data)


def config(**values: Any) -> Change:
    """Changes fields of the config."""

    def apply(folder: Path) -> None:
        stated = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(stated | values))

    return apply


def config_text(text: str) -> Change:
    return lambda folder: (folder / CONFIG).write_text(text)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def linked_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")


def rename(held: dict[str, Tensor], old: str, new: str) -> None:
    held[new] = held.pop(old)


A = f"{LAYER}.lora_A.weight"

CASES: list[tuple[str, Change, str, str]] = [
    # The container (T1, T2, T3).
    ("empty", bytes_only(b""), WEIGHTS, "empty|0 bytes|too short|shorter"),
    ("cut short", raw(lambda data: data[:-16]), WEIGHTS, "end|bytes|truncated|download"),
    ("bytes to spare", raw(lambda data: data + b"more"), WEIGHTS, "trailing|after|more|bytes"),
    ("header too long", raw(lambda data: struct.pack("<Q", 1 << 60) + data[8:]), WEIGHTS, "header"),
    ("header is not JSON", header(lambda text: text.replace("{", "[", 1)), WEIGHTS, "header|JSON"),
    ("a page of HTML", bytes_only(b"<!DOCTYPE html><html>Sign in</html>"), WEIGHTS, "HTML|page"),
    ("a pointer", bytes_only(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), WEIGHTS, "LFS|pointer"),
    ("a name twice", header(lambda text: text.replace("layers.1.lora_A", "layers.0.lora_A")), WEIGHTS, "twice|duplicate"),
    ("an unknown dtype", header(lambda text: text.replace('"F32"', '"F33"', 1)), WEIGHTS, "F33"),
    ("overlapping", header(lambda text: re.sub(r"\[\d+,", "[0,", text)), WEIGHTS, "overlap|offset|bytes"),
    ("a pipe", pipe, WEIGHTS, "regular|file"),
    ("a link that leads away", linked_out, WEIGHTS, "link"),
    ("integers", tensors(lambda held: held.update({A: held[A].to(torch.int32)})), WEIGHTS, "int32"),
    ("bytes for weights", tensors(lambda held: held.update({A: held[A].to(torch.int8)})), WEIGHTS, "I8"),
    ("no elements", tensors(lambda held: held.update({A: torch.zeros(0, 8)})), WEIGHTS, "without elements|no elements"),
    # What is in it (T4).
    ("a tensor is missing", tensors(lambda held: held.pop(A)), WEIGHTS, r"1 missing: '.*layers\.0\.lora_A\.weight'"),
    (
        "a tensor too many",
        tensors(lambda held: held.update({f"{LAYER}.lora_C.weight": torch.zeros(2)})),
        WEIGHTS,
        r"1 unexpected: '.*lora_C\.weight' \(nearest in the model: '.*lora_.\.weight'\)",
    ),
    ("another layer", tensors(lambda held: rename(held, A, A.replace(".0.", ".9."))), WEIGHTS, "1 missing: .*; 1 unexpected: "),
    (
        "another shape",
        tensors(lambda held: held.update({A: torch.zeros(4, 9)})),
        WEIGHTS,
        r"has shape \[4, 9\], the model needs \[4, 8\]",
    ),
    (
        "a weight of the model",
        tensors(lambda held: held.update({"base_model.model.head.weight": torch.zeros(2, 8)})),
        WEIGHTS,
        r"would overwrite weights of the model .*'base_model\.model\.head\.weight'",
    ),
    (
        "a bias of the model",
        tensors(lambda held: held.update({f"{LAYER}.base_layer.bias": torch.zeros(8)})),
        WEIGHTS,
        r"would overwrite weights of the model .*layers\.0\.base_layer\.bias",
    ),
    # The config (T5, T6, T7, T8).
    ("no config", lambda folder: (folder / CONFIG).unlink(), CONFIG, "no|missing|not there"),
    ("a config that is not JSON", config_text("{'r': 8}"), CONFIG, "JSON|line 1"),
    ("a config that is a list", config_text("[]"), CONFIG, "object"),
    ("a deep config", config_text('{"peft_type":"LORA","a":' + "[" * 400 + "]" * 400 + "}"), CONFIG, "deep|recursion|128"),
    ("a config without a type", config_text("{}"), CONFIG, "peft_type"),
    ("an unknown type", config(peft_type="MAGIC"), CONFIG, "MAGIC"),
    ("a rank that is text", config(r="4"), CONFIG, r"\br\b"),
    ("a rank that is true", config(r=True), CONFIG, r"\br\b"),
    ("a rank of zero", config(r=0), CONFIG, r"\br\b|rank"),
    ("an enormous rank", config(r=10**12), "adapter", r"\br\b|rank|shape"),
    ("another rank", config(r=5), WEIGHTS, r"has shape \[4, 8\], the model needs \[5, 8\]"),
    ("a strength that is no number", config_text('{"peft_type":"LORA","lora_alpha":NaN}'), CONFIG, "JSON|lora_alpha|NaN"),
    ("a pattern that is none", config(target_modules="lay(ers"), CONFIG, r"lay\(ers"),
    ("a pattern without end", config(target_modules="(a|a)*(b|b)*(.|.)*" * 12 + "!"), CONFIG, "match|pattern|cost|budget|found"),
    ("no such layer", config(target_modules=["2"]), CONFIG, "not found in the base model"),
    # What is never read (T9, T11).
    ("a pickle", pickled, "", r"adapter_model\.bin|pickle"),
]


@pytest.mark.parametrize(("change", "file", "reason"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
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
    with pytest.warns(PeftrsWarning, match=r"1 missing: .*layers\.0\.lora_A.*; 1 unexpected: .*layers\.9\.lora_A"):
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


def test_nothing_that_a_config_names_is_imported_or_opened(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
