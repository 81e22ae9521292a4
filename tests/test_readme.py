"""Every command and program of the README runs as printed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

from peftrs import LoraConfig, get_peft_model
from tests.model.tiny import llama

CHECKOUT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
PROGRAMS = [body for language, body in BLOCKS if language == "python"]
PRINTED = [
    line
    for language, body in BLOCKS
    if language == "console"
    for line in re.findall(r"^\$ (.*)$", body, re.MULTILINE)
]
COMMANDS = [re.split(r"\s+#", line)[0] for line in PRINTED]

TRAIN = """
import sys
from peft import LoraConfig
from transformers.utils import is_peft_available

assert is_peft_available() and LoraConfig.__module__.startswith("peftrs"), LoraConfig
assert sys.argv[1:] in (["--lr", "1e-4"], [])
"""

# What the README's programs take for given: three rows of tokens.
BATCH = """
from torch import ones as _ones
batch_of_three = {"input_ids": 7 * _ones(3, 5).long(), "attention_mask": _ones(3, 5).long()}
"""


def adapter(folder: Path, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(llama(), config)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the README's commands are given."""
    folder = tmp_path_factory.mktemp("readme")
    llama().save_pretrained(folder / "base")
    for seed, name in enumerate(("other", "other-adapter", "style", "facts", "adapter")):
        model = adapter(folder / name, seed)
    model.merge_and_unload().save_pretrained(folder / "merged")
    subprocess.run(
        [script("peftrs-merge"), "base", "adapter@0.5", "-o", "half", "--quiet"],
        cwd=folder,
        check=True,
        timeout=60,
    )
    (folder / "train.py").write_text(TRAIN)
    return folder


def script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def run(arguments: list[str], folder: Path) -> None:
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        arguments,
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("make ")])
def test_a_command_runs_as_printed(command: str, prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "here")
    if "verify" in command and "@0.5" in command:
        shutil.rmtree(folder / "merged")
        (folder / "half").rename(folder / "merged")
    if (written := re.search(r" -o (\S+)", command)) is not None:
        shutil.rmtree(folder / written[1], ignore_errors=True)
    run(["bash", "-c", command], folder)
    assert written is None or any((folder / written[1]).glob("*.safetensors"))


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_program_runs_as_printed(number: int, prepared: Path, tmp_path: Path) -> None:
    if "BitsAndBytesConfig" in PROGRAMS[number]:
        pytest.importorskip("bitsandbytes")
    folder = shutil.copytree(prepared, tmp_path / "here")
    before = PROGRAMS[0] if 0 < number < len(PROGRAMS) - 1 else ""  # the last one stands before every import
    (folder / "program.py").write_text(BATCH * (number > 0) + before + PROGRAMS[number])
    run([sys.executable, "-P", "program.py"], folder)


def test_every_command_of_make_is_there() -> None:
    named = set(re.findall(r"make ([a-z][a-z0-9-]*)", "\n".join(body for _, body in BLOCKS)))
    named |= set(re.findall(r"`make ([a-z][a-z0-9-]*)`", (CHECKOUT / "README.md").read_text()))
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_the_picture_is_that_of_the_readings(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    subprocess.run(
        [sys.executable, "benches/picture.py", str(tmp_path / "speed.svg")], cwd=CHECKOUT, check=True
    )
    # Letters are outlines, with what they say in comments.
    drawn, kept = (
        re.findall("<!-- (.*) -->", (folder / "speed.svg").read_text())
        for folder in (tmp_path, CHECKOUT / "benches/results")
    )
    assert drawn == kept
    assert len(drawn) > 20
