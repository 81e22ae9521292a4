"""Files and outputs agree with PEFT 0.21.2, both ways, for every configuration; so do losses from the same
start.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftrs
from tests.interchange.cases import CASES, Case

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)
"""PEFT warns of what these configurations ask for on purpose."""


def adapted(library: Any, case: Case, **extra: Any) -> tuple[nn.Module, Any]:
    base, run = case.model()
    arguments = {**case.arguments, **extra}
    return library.get_peft_model(base, getattr(library, case.config)(**arguments)).eval(), run


def shake(model: nn.Module) -> None:
    """Moves every trained tensor off its start, the same way for the same names."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert distance <= tolerance, f"‖difference‖ is {distance:.2e} of ‖output‖"


def load(library: Any, case: Case, folder: Path) -> tuple[nn.Module, Any]:
    base, run = case.model()
    return library.PeftModel.from_pretrained(base, folder).eval(), run


def same_files(case: Case, ours: Path, theirs: Path) -> None:
    mine, other = (
        load_file(ours / "adapter_model.safetensors"),
        load_file(theirs / "adapter_model.safetensors"),
    )
    assert {name: tensor.shape for name, tensor in mine.items()} == {
        name: tensor.shape for name, tensor in other.items()
    }
    mine_config, other_config = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs)
    )
    for config in (mine_config, other_config):
        for name in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
            if isinstance(config.get(name), list):
                config[name] = sorted(set(config[name]))  # PEFT adds the heads again at each load
        if not case.same_targets:
            config.pop("target_modules")
    assert mine_config == other_config


@cases
def test_their_adapter_loads_here(case: Case, tmp_path: Path) -> None:
    theirs, run = adapted(peft, case)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    if case.arguments.get("init_lora_weights") == "pissa_niter_16":
        theirs, _ = load(peft, case, tmp_path / "theirs")
    ours, _ = load(peftrs, case, tmp_path / "theirs")
    if case.unmerged:
        near(run(ours), run(theirs), case.tolerance)
    ours.save_pretrained(tmp_path / "ours")
    same_files(case, tmp_path / "ours", tmp_path / "theirs")
    saved, loaded = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    for name, tensor in loaded.items():
        assert torch.equal(saved[name], tensor), name
    if case.merges:
        near(run(ours.merge_and_unload()), run(theirs.merge_and_unload()), case.tolerance)


@cases
def test_our_adapter_loads_there(case: Case, tmp_path: Path) -> None:
    ours, run = adapted(peftrs, case)
    shake(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs, _ = load(peft, case, tmp_path / "ours")
    if case.unmerged:
        near(run(ours), run(theirs), case.tolerance)
    theirs.save_pretrained(tmp_path / "theirs")
    same_files(case, tmp_path / "ours", tmp_path / "theirs")
    if case.merges:
        near(run(ours.merge_and_unload()), run(theirs.merge_and_unload()), case.tolerance)


@pytest.mark.parametrize("case", [case for case in CASES if case.trains], ids=lambda case: case.id)
def test_training_gives_their_losses(case: Case, tmp_path: Path) -> None:
    theirs, run = adapted(peft, case)
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    losses = []
    for library in (peft, peftrs):
        base, _ = case.model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.02)
        target = torch.randn(run(model).shape, generator=torch.Generator().manual_seed(9))
        losses.append([])
        for _ in range(20):
            loss = (run(model) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
