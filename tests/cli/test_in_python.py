"""Methods without a Rust kernel: computed by their Python class where the wheel's tool meets one, and only
there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftrs
from peftrs import _native
from tests.interchange.cases import toy
from tests.interchange.test_with_peft import shake


def saved(folder: Path, **settings: Any) -> nn.Module:
    """A base and an adapter in `folder`, and the adapted model."""
    base, _ = toy()
    (folder / "base").mkdir(exist_ok=True)
    save_file(dict(base.state_dict()), folder / "base" / "model.safetensors")
    adapted = peftrs.get_peft_model(base, peftrs.LoraConfig(r=2, target_modules=["lin0", "lin1"], **settings))
    shake(adapted)
    adapted.save_pretrained(folder / "adapter")
    return adapted


def merge(folder: Path, *adapters: str) -> int:
    arguments = [
        str(folder / "base"),
        *(str(folder / adapter) for adapter in adapters),
        "-o",
        str(folder / "out"),
        "--quiet",
    ]
    return _native.merge_main(arguments)


def test_torch_is_imported_for_such_methods_alone(tmp_path: Path) -> None:
    for start, expected in (("gaussian", False), ("olora", True)):
        saved(tmp_path, init_lora_weights=start)
        program = (
            "import sys; from peftrs import _native; code = _native.merge_main(sys.argv[1:]); print(code,"
            " 'torch' in sys.modules)"
        )
        arguments = [
            str(tmp_path / "base"),
            str(tmp_path / "adapter"),
            "-o",
            str(tmp_path / start),
            "--quiet",
        ]
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.stdout.split() == ["0", str(expected)], done.stderr


def test_a_weight_multiplies_what_such_a_method_adds(tmp_path: Path) -> None:
    adapted = saved(tmp_path, init_lora_weights="pissa", rank_pattern={"lin1": 3}, alpha_pattern={"lin0": 5})
    before = load_file(tmp_path / "base" / "model.safetensors")["lin0.weight"].double()
    assert merge(tmp_path, "adapter@0.5") == 0
    half = load_file(tmp_path / "out" / "model.safetensors")["lin0.weight"].double() - before
    whole = adapted.merge_and_unload().state_dict()["lin0.weight"].double() - before
    torch.testing.assert_close(2 * half, whole, rtol=0, atol=1e-6)


def test_what_python_cannot_do_either_is_refused_before_anything_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, init_lora_weights="pissa")
    config = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text())
    (tmp_path / "twin").mkdir()
    for file in (tmp_path / "adapter").iterdir():
        (tmp_path / "twin" / file.name).write_bytes(file.read_bytes())
    assert merge(tmp_path, "adapter", "twin") == 1
    assert "change, one of them in Python, lin0.weight" in capfd.readouterr().err
    for change, message in (
        ({"peft_type": "BOFT"}, "peft_type 'BOFT' is not a method of this version of peftrs"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' is not built yet"),
        ({"r": 3}, "has tensors {'lora_A.weight': (2, 8), 'lora_B.weight': (16, 2)} for a weight [16, 8]"),
    ):
        config.write_text(json.dumps(values | change))
        assert merge(tmp_path, "adapter") == 1
        assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
