"""The console script as people use it: a bar on a terminal, and an end when they ask for it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import nn

import peftrs

pty = pytest.importorskip("pty")

PROGRAM = "import sys; from peftrs.cli import merge; sys.exit(merge())"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2048), nn.Linear(2048, 2048))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    peftrs.get_peft_model(model, peftrs.LoraConfig(r=2, target_modules=["0"])).save_pretrained(
        tmp_path / "adapter"
    )
    return tmp_path


def start(folder: Path, *options: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    base, adapter, out = (str(folder / name) for name in ("base", "adapter", "out"))
    command = [sys.executable, "-P", "-c", PROGRAM, base, adapter, "-o", out, *options]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr)


def seen(folder: Path, *options: str) -> str:
    """What a merge prints on a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    process = start(folder, "--no-sync", *options, stderr=theirs)
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:  # how Linux says that the other side is closed
        pass
    finally:
        os.close(ours)
    assert process.communicate(timeout=60)[0] == b""
    assert process.returncode == 0, text
    return text.decode()


def test_a_terminal_shows_bytes_rate_and_time_left(folder: Path) -> None:
    text = seen(folder)
    assert re.search(r"[\d.]+ (B|KiB|MiB)/48\.0\d MiB [\d.]+ \w+/s, \d+s left", text), text
    assert text.endswith(" s\r\n")
    assert "1 of 6 tensors changed, 48.0" in text.splitlines()[-1]


def test_quiet_is_silent_there_too(folder: Path) -> None:
    assert seen(folder, "--quiet") == ""
    assert (folder / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_ends_it_and_nothing_is_left(number: int, code: int, folder: Path) -> None:
    size = 1 << 30
    header = json.dumps({"big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(folder / "base" / "more.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    (folder / "base" / "model.safetensors").rename(folder / "base" / "first.safetensors")
    places = dict.fromkeys(
        [f"{index}.{part}" for index in range(3) for part in ("weight", "bias")], "first.safetensors"
    )
    index = {"weight_map": {**places, "big": "more.safetensors"}}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    process = start(folder)
    while not list(folder.glob("out.tmp-*/more.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (code, b"error: interrupted, nothing was written\n")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]
