"""Repositories come out of the hub's cache without the network, at the revision and from the subfolder asked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import peftrs
from peftrs import CheckpointError, LoraConfig
from peftrs.model.hotswap import hotswap_adapter
from tests.model.tiny import llama, logits, shake

NAME = "somebody/adapter"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cached(tmp_path: Path) -> tuple[str, dict[tuple[str, str | None], Any]]:
    """A cache with two revisions of a repository, each with an adapter in its root and one in a subfolder; and what each gives."""
    root, outputs = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}", {}
    for seed, (revision, commit) in enumerate(COMMITS.items()):
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        for subfolder in (None, "inner"):
            model = peftrs.get_peft_model(llama(), LoraConfig(r=2))
            shake(model, seed * 2 + (subfolder is not None))
            model.save_pretrained(root / "snapshots" / commit / (subfolder or ""))
            outputs[revision, subfolder] = logits(model)
    return str(tmp_path / "cache"), outputs


@pytest.mark.parametrize("revision", COMMITS)
@pytest.mark.parametrize("subfolder", [None, "inner"])
def test_the_adapter_is_the_one_asked_for(cached: Any, revision: str, subfolder: str | None) -> None:
    cache, outputs = cached
    options: dict[str, Any] = {"cache_dir": cache, "revision": revision, "subfolder": subfolder}
    model = peftrs.PeftModel.from_pretrained(llama(), NAME, **options)
    assert torch.equal(logits(model), outputs[revision, subfolder])
    assert len(peftrs.load_peft_weights(NAME, **options)) == 8
    assert peftrs.PeftConfig.from_pretrained(NAME, **options).r == 2  # type: ignore[attr-defined]
    model.load_adapter(NAME, "other", **options | {"revision": "main", "subfolder": None})
    model.set_adapter("other")
    assert torch.equal(logits(model), outputs["main", None])
    hotswap_adapter(model, NAME, "other", **options)
    assert torch.equal(logits(model), outputs[revision, subfolder])


def test_without_a_revision_it_is_the_main_one(cached: Any) -> None:
    cache, outputs = cached
    assert torch.equal(logits(peftrs.PeftModel.from_pretrained(llama(), NAME, cache_dir=cache)), outputs["main", None])


def test_what_the_cache_lacks_is_said(cached: Any) -> None:
    cache, _ = cached
    for options in ({"revision": "v3"}, {"subfolder": "nowhere"}):
        with pytest.raises(CheckpointError, match="neither a local folder nor a repository that can be read"):
            peftrs.PeftModel.from_pretrained(llama(), NAME, cache_dir=cache, **options)
    shutil.rmtree(cache)
    with pytest.raises(CheckpointError, match=NAME):
        peftrs.PeftModel.from_pretrained(llama(), NAME, cache_dir=cache)
