"""Ways in which an adapter's folder can be wrong, each with the file that the error must name and what it
must say.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.layers.0"

Change = Callable[[Path], object]


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


def one(description: str, data: bytes = b"", name: bytes = b"a") -> Change:
    """A file of one tensor, described in JSON."""
    text = b'{"' + name + b'":{' + description.encode() + b"}}"
    return bytes_only(struct.pack("<Q", len(text)) + text + data)


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


def in_its_place(make: Callable[[Path], object]) -> Change:
    """Puts something other than a file where the weights are looked for."""

    def apply(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        make(folder / WEIGHTS)

    return apply


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
    (
        "a pointer",
        bytes_only(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        WEIGHTS,
        "LFS|pointer",
    ),
    (
        "a name twice",
        header(lambda text: text.replace("layers.1.lora_A", "layers.0.lora_A")),
        WEIGHTS,
        "twice|duplicate",
    ),
    ("an unknown dtype", header(lambda text: text.replace('"F32"', '"F33"', 1)), WEIGHTS, "F33"),
    ("overlapping", header(lambda text: re.sub(r"\[\d+,", "[0,", text)), WEIGHTS, "overlap|offset|bytes"),
    (
        "an unknown dtype of eight bits",
        one('"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]', b"1"),
        WEIGHTS,
        "F8_E4M3",
    ),
    ("a hole", one('"dtype":"F32","shape":[1],"data_offsets":[4,8]', bytes(8)), WEIGHTS, "hole"),
    (
        "backwards",
        one('"dtype":"F32","shape":[1],"data_offsets":[4,0]', bytes(4)),
        WEIGHTS,
        "before their start",
    ),
    ("a negative offset", one('"dtype":"F32","shape":[1],"data_offsets":[-4,0]', bytes(4)), WEIGHTS, "-4"),
    ("a broken offset", one('"dtype":"F32","shape":[1],"data_offsets":[0,4.5]', bytes(4)), WEIGHTS, "4.5"),
    (
        "other bytes than its shape",
        one('"dtype":"F32","shape":[2],"data_offsets":[0,4]', bytes(4)),
        WEIGHTS,
        "takes 8 bytes",
    ),
    (
        "larger than can be",
        one('"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]'),
        WEIGHTS,
        "larger than can be",
    ),
    (
        "nothing times too much",
        one('"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]'),
        WEIGHTS,
        "larger than can",
    ),
    ("not UTF-8", one('"dtype":"F32","shape":[1],"data_offsets":[0,4]', bytes(4), b"\xff"), WEIGHTS, "UTF-8"),
    (
        "a name twice, spelled otherwise",
        header(lambda text: text.replace("layers.1", "layer\\u0073.0")),
        WEIGHTS,
        "twice",
    ),
    (
        "metadata twice",
        header(lambda text: '{"__metadata__":{},' + text[1:]),
        WEIGHTS,
        "`__metadata__` occurs twice",
    ),
    ("a pipe", in_its_place(os.mkfifo), WEIGHTS, "not a regular file"),
    ("a folder for a file", in_its_place(Path.mkdir), WEIGHTS, "is a folder"),
    ("a device", in_its_place(lambda path: path.symlink_to("/dev/zero")), WEIGHTS, "link|regular"),
    ("a link that leads away", linked_out, WEIGHTS, "link"),
    ("integers", tensors(lambda held: held.update({A: held[A].to(torch.int32)})), WEIGHTS, "int32"),
    ("bytes for weights", tensors(lambda held: held.update({A: held[A].to(torch.int8)})), WEIGHTS, "I8"),
    ("no dimensions", tensors(lambda held: held.update({A: torch.tensor(1.0)})), WEIGHTS, r"has shape \[\]"),
    (
        "no elements",
        tensors(lambda held: held.update({A: torch.zeros(0, 8)})),
        WEIGHTS,
        "without elements|no elements",
    ),
    # What is in it (T4).
    (
        "a tensor is missing",
        tensors(lambda held: held.pop(A)),
        WEIGHTS,
        r"1 missing: '.*layers\.0\.lora_A\.weight'",
    ),
    (
        "a tensor too many",
        tensors(lambda held: held.update({f"{LAYER}.lora_C.weight": torch.zeros(2)})),
        WEIGHTS,
        r"1 unexpected: '.*lora_C\.weight' \(nearest in the model: '.*lora_.\.weight'\)",
    ),
    (
        "another layer",
        tensors(lambda held: rename(held, A, A.replace(".0.", ".9."))),
        WEIGHTS,
        "1 missing: .*; 1 unexpected: ",
    ),
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
    (
        "a deep config",
        config_text('{"peft_type":"LORA","a":' + "[" * 400 + "]" * 400 + "}"),
        CONFIG,
        "deep|recursion|128",
    ),
    ("a config without a type", config_text("{}"), CONFIG, "peft_type"),
    ("an unknown type", config(peft_type="MAGIC"), CONFIG, "MAGIC"),
    ("a rank that is text", config(r="4"), CONFIG, r"\br\b"),
    ("a rank that is true", config(r=True), CONFIG, r"\br\b"),
    ("a rank of zero", config(r=0), CONFIG, r"\br\b|rank"),
    ("an enormous rank", config(r=10**12), "adapter", r"\br\b|rank|shape"),
    ("another rank", config(r=5), WEIGHTS, r"has shape \[4, 8\], the model needs \[5, 8\]"),
    (
        "a strength that is no number",
        config_text('{"peft_type":"LORA","lora_alpha":NaN}'),
        CONFIG,
        "JSON|lora_alpha|NaN",
    ),
    ("a pattern that is none", config(target_modules="lay(ers"), CONFIG, r"lay\(ers"),
    (
        "a pattern without end",
        config(target_modules="(a|a)*(b|b)*(.|.)*" * 12 + "!"),
        CONFIG,
        "match|pattern|cost|budget|found",
    ),
    ("no such layer", config(target_modules=["2"]), CONFIG, "not found in the base model"),
    (
        "an infinite strength",
        config_text('{"peft_type":"LORA","target_modules":["0"],"lora_alpha":1e999}'),
        CONFIG,
        "JSON|lora_alpha",
    ),
    ("a rank in a pattern that is text", config(rank_pattern={"0": "4"}), CONFIG, "rank_pattern"),
    ("a fraction for a rank", config(r=4.5), CONFIG, r"\br\b"),
    ("more layers than can be", config(layer_replication=[[0, 10**9]]), CONFIG, "layer_replication"),
    (
        "countless layers",
        config(layers_to_transform=list(range(200_000))),
        CONFIG,
        "layers_to_transform|100000|100,000",
    ),
    ("a layer below zero", config(layers_to_transform=[-1]), CONFIG, "layers_to_transform"),
    ("tokens below zero", config(trainable_token_indices=[-1]), CONFIG, "trainable_token_indices"),
    (
        "countless virtual tokens",
        config_text(
            '{"peft_type":"PROMPT_TUNING","task_type":"CAUSAL_LM","num_virtual_tokens":1000000000000}'
        ),
        CONFIG,
        "num_virtual_tokens",
    ),
    (
        "a config without end",
        config_text('{"peft_type":"LORA","a":"' + "a" * (17 << 20) + '"}'),
        CONFIG,
        "at most|bytes",
    ),
    *(
        (f"a pattern that is none in {field}", config(**{field: value} | more), CONFIG, rf"{field}.*lay\(ers")
        for field, value, more in [
            ("exclude_modules", "lay(ers", {}),
            ("rank_pattern", {"lay(ers": 4}, {}),
            ("alpha_pattern", {"lay(ers": 4}, {}),
            ("layers_pattern", "lay(ers", {"layers_to_transform": [0]}),
            ("modules_to_save", ["lay(ers"], {}),
        ]
    ),
    # What is never read (T9, T11).
    ("a pickle", pickled, "", r"adapter_model\.bin|pickle"),
]
