"""A process that has loaded and merged can fork: its children load and merge, to the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import peftrs
from tests.io.forks import LIMIT, Net

COUNT, MANY = 8, 200
"""How many children are made, and how many where there is time."""
PROGRAM = Path(__file__).with_name("forks.py")

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="counts threads in /proc, and forks"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an adapter that changes it."""
    folder = tmp_path_factory.mktemp("forks")
    net = Net()
    (folder / "base").mkdir()
    save_file(net.state_dict(), folder / "base" / "model.safetensors", metadata={"format": "pt"})
    config = peftrs.LoraConfig(target_modules=["first", "second"], init_lora_weights=False)
    torch.manual_seed(1)
    peftrs.get_peft_model(net, config).save_pretrained(folder / "adapter")
    return folder


def fork(folder: Path, way: str, count: int) -> None:
    """Runs the program, and kills it and its children if they take too long."""
    command = [sys.executable, "-P", str(PROGRAM), str(folder), way, str(count)]
    environment = os.environ | {"RAYON_NUM_THREADS": "4"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **streams)
    try:
        told, _ = process.communicate(timeout=LIMIT * 3 + count)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        pytest.fail(f"did not end; it said {process.communicate()[0]}")
    assert process.returncode == 0, told


@pytest.mark.parametrize("count", [COUNT, pytest.param(MANY, marks=pytest.mark.long)])
@pytest.mark.parametrize("way", ["again", "threads", "tools"])
def test_children_load_and_merge_as_their_parent_did(folder: Path, way: str, count: int) -> None:
    fork(folder, way, count)


def test_children_of_children_do_so_too(folder: Path) -> None:
    fork(folder, "descendants", COUNT)


def test_workers_of_a_data_loader_load_adapters(folder: Path) -> None:
    fork(folder, "loader", 0)
