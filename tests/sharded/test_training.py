"""Training shared out over processes gives the losses, and the files, of one process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.sharded import group, runs

SPREAD = importlib.util.find_spec("transformers.distributed") is not None and hasattr(
    importlib.import_module("transformers.distributed"), "DistributedConfig"
)
"""Whether this version of transformers spreads layers by plans of `DTensor`s."""

needs_plans = pytest.mark.skipif(
    not SPREAD, reason="this version of transformers has no tensor parallelism over DTensor"
)
TWO = [
    "ddp",
    "fsdp_lora",
    "fsdp_dora",
    "fsdp_pissa",
    "fsdp_ia3",
    "fsdp_embedding",
    "fsdp_narrow",
    "fsdp_replicated",
    "fsdp_loading",
    "refusals",
    *(
        ["tp_lora", "tp_dora", "tp_embedding", "tp_pissa", "tp_ia3", "tp_qalora", "tp_others", "tp_loading"]
        if SPREAD
        else []
    ),
]
FOUR = ["fsdp_lora", *(["both"] if SPREAD else [])]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="starts processes that find this module by its name"),
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 has no FSDP2 on CPUs"
    ),
]


class Ran:
    """What the runs brought back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.alone = {method: runs.alone(folder, method) for method in runs.METHODS}

    def saved(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "adapter_model.safetensors")

    def answers(self, method: str) -> Any:
        return torch.load(self.folder / f"alone-{method}" / "answers.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    ran = Ran(tmp_path_factory.mktemp("two"))
    group.run(2, [f"tests.sharded.runs.{name}" for name in TWO], ran.folder)
    return ran


def agrees(
    ran: Ran, task: str, saved: str, method: str, world: int = 2, loss: float = 1e-5, value: float = 1e-4
) -> None:
    """The losses and the file of a run are those of one process."""
    for found in group.results(ran.folder, task, world):
        assert max(abs(a - b) for a, b in zip(found["losses"], ran.alone[method], strict=True)) <= loss
    files = ran.saved(saved), ran.saved(f"alone-{method}")
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        assert tensor.dtype == files[1][key].dtype
        assert (tensor - files[1][key]).abs().max() <= value, key


def merges(ran: Ran, task: str, method: str, close: float = 1e-5) -> None:
    """Merged weights answer as the adapter does on one process, and unmerging brings back every bit."""
    for found in group.results(ran.folder, task, 2):
        assert (found["answers"] - ran.answers(method)).abs().max() <= close
        assert (found["merged"] - ran.answers(method)).abs().max() <= close
        assert found["same"]


def test_two_processes_that_share_the_batch(two: Ran) -> None:
    agrees(two, "ddp", "ddp", "lora")


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "ia3", "embedding"])
def test_two_processes_that_share_all_parameters(two: Ran, method: str) -> None:
    agrees(two, f"fsdp_{method}", f"fsdp-2-{method}", method)
    merges(two, f"fsdp_{method}", method)


def test_two_processes_that_share_narrow_layers_under_wide_adapters(two: Ran) -> None:
    assert {tensor.dtype for tensor in two.saved("fsdp-2-narrow").values()} == {torch.float32}
    agrees(two, "fsdp_narrow", "fsdp-2-narrow", "narrow", loss=2e-3, value=0.05)
    merges(two, "fsdp_narrow", "narrow", close=0.02)


def test_two_processes_that_share_the_frozen_layers_alone(two: Ran) -> None:
    agrees(two, "fsdp_replicated", "fsdp-replicated", "lora")
    merges(two, "fsdp_replicated", "lora")


@needs_plans
@pytest.mark.parametrize("method", ["lora", "dora", "qalora", "pissa", "ia3", "embedding"])
def test_two_processes_with_slices_of_every_layer(two: Ran, method: str) -> None:
    agrees(two, f"tp_{method}", f"tp-{method}", method)
    merges(two, f"tp_{method}", method)


@needs_plans
def test_methods_that_do_not_follow_slices_are_refused(two: Ran) -> None:
    for found in group.results(two.folder, "tp_others", 2):
        assert {
            name for name, told in found.items() if "does not work on tensor-parallel layers" in told
        } == {"oft"}


@needs_plans
def test_an_adapter_of_one_process_loads_onto_slices(two: Ran) -> None:
    for found in group.results(two.folder, "tp_loading", 2):
        assert (found["answers"] - two.answers("lora")).abs().max() <= 1e-5
        assert (found["second"] - two.answers("dora")).abs().max() <= 1e-5


def test_an_adapter_of_one_process_loads_into_one_in_parts(two: Ran) -> None:
    for found in group.results(two.folder, "fsdp_loading", 2):
        assert (found["answers"] - two.answers("lora")).abs().max() <= 1e-5


def test_parts_and_empty_tensors_reach_no_file(two: Ran) -> None:
    for found in group.results(two.folder, "refusals", 2):
        assert "28 of the 28 tensors" in found["parts"]
        assert "shape [2, 32] instead of [4, 32]" in found["parts"]
        assert "shape [0] instead of [4, 32]" in found["empty"]
        assert found["kept"]


def test_an_adapter_that_would_be_left_out_of_the_sharing_is_refused(two: Ran) -> None:
    for found in group.results(two.folder, "refusals", 2):
        assert "add the adapter first and call fully_shard" in found["late"]


def test_four_processes(tmp_path: Path) -> None:
    ran = Ran(tmp_path)
    group.run(4, [f"tests.sharded.runs.{name}" for name in FOUR], ran.folder)
    agrees(ran, "fsdp_lora", "fsdp-4-lora", "lora", world=4)
    if SPREAD:
        agrees(ran, "both", "both", "lora", world=4)
