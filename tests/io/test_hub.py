"""Repositories come out of the hub's cache without the network, at the revision and from the subfolder asked
for.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import peftrs
from peftrs import CheckpointError, LoraConfig
from peftrs.convert.hotswap import hotswap_adapter
from tests.model.tiny import llama, logits, shake

NAME = "somebody/adapter"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cached(tmp_path: Path) -> tuple[str, dict[tuple[str, str | None], Any]]:
    """A cache with two revisions of a repository, each with an adapter in its root and one in a subfolder;
    and what each gives.
    """
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
    assert torch.equal(
        logits(peftrs.PeftModel.from_pretrained(llama(), NAME, cache_dir=cache)), outputs["main", None]
    )


def test_what_the_cache_lacks_is_said(cached: Any) -> None:
    cache, _ = cached
    for options in ({"revision": "v3"}, {"subfolder": "nowhere"}):
        with pytest.raises(CheckpointError, match="neither a local folder nor a repository that can be read"):
            peftrs.PeftModel.from_pretrained(llama(), NAME, cache_dir=cache, **options)
    shutil.rmtree(cache)
    with pytest.raises(CheckpointError, match=NAME):
        peftrs.PeftModel.from_pretrained(llama(), NAME, cache_dir=cache)


class Hub:
    """Stands for the hub's own client, and keeps what it is told and given."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.files: set[str] = set()

    def __call__(self, token: Any) -> Hub:
        self.told.append(("client", {"token": token}))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.told.append((repo_id, options))
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.told.append((repo_id, options))

    def upload_folder(self, repo_id: str, folder_path: str, **options: Any) -> str:
        self.told.append((repo_id, options))
        self.files = {path.name for path in Path(folder_path).iterdir()}
        return "the commit"


def test_models_and_configs_are_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    model = peftrs.get_peft_model(llama(), LoraConfig())
    assert (
        model.push_to_hub("mine", private=True, token="secret", revision="new", commit_message="Why")
        == "the commit"
    )
    assert hub.files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.told == [
        ("client", {"token": "secret"}),
        ("mine", {"private": True, "exist_ok": True}),
        ("someone/mine", {"branch": "new", "exist_ok": True}),
        (
            "someone/mine",
            {"commit_message": "Why", "commit_description": None, "revision": "new", "create_pr": False},
        ),
    ]
    hub.told.clear()
    LoraConfig().push_to_hub("mine")
    assert hub.files == {"adapter_config.json"}
    assert hub.told[-1][1]["commit_message"] == "Upload LoraConfig"
    assert len(hub.told) == 3
