"""`peftrs extract`: the adapter between two models, which verify accepts as what was merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peftrs import LoraConfig, get_peft_model
from tests.cli.test_tool import run
from tests.model import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny.llama()
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    tiny.shake(adapted)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path


@pytest.mark.parametrize(
    "options", [[], ["--rank", "3"], ["--energy", "1.0"], ["--target", "q_proj", "--target", "down_proj"]]
)
def test_what_is_extracted_is_what_was_merged(
    options: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        capfd, "extract", folder / "base", folder / "merged", "-o", folder / "out", *options, "--json"
    )
    assert (code, err) == (0, f"extracted into {folder / 'out'}\n")
    report = json.loads(out)
    assert report["energy"] == pytest.approx(1)
    assert len(report["layers"]) == 4
    code, out, err = run(capfd, "verify", folder / "base", folder / "out", folder / "merged")
    assert code == 0, out


def test_the_table_says_how_much_is_kept(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capfd,
        "extract",
        folder / "base",
        folder / "merged",
        "-o",
        folder / "out",
        "--rank",
        "1",
        "--target",
        r".*q_proj",
    )
    assert code == 0
    assert out.splitlines()[0].split() == ["layer", "rank", "|change|", "part", "kept"]
    assert out.splitlines()[-1].endswith("of the change is in the adapter")
    assert 0 < float(out.splitlines()[-1].split()[0]) < 1


@torch.no_grad()
def test_refusals_are_one_line_and_a_hint(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, "extract", folder / "base", folder / "base", "-o", folder / "out")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "differs" in err
    assert not (folder / "out").exists()
    code, _, err = run(
        capfd, "extract", folder / "base", folder / "merged", "-o", folder / "out", "--rank", "0"
    )
    assert code == 2
