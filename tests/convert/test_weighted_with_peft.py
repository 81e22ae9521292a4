"""What PEFT combines rightly comes out the same here, and so does its "linear" where that is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

import peftrs
from peftrs import LoraConfig, PeftrsWarning
from peftrs.convert import habits, task_vectors, weighted
from tests.convert.test_weighted import toy
from tests.model.tiny import shake

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
TARGETS = ["lin0", "lin1", "hf", "emb", "conv2"]
PEFTS = [kind for kind in weighted.KINDS if kind != "exact"]


@pytest.fixture
def mixing() -> Iterator[None]:
    before = habits.mix_linear(True)
    yield
    habits.mix_linear(before)


def adapters(tmp_path: Path, **settings: Any) -> tuple[Any, Any]:
    """The same two adapters in both libraries."""
    model = peftrs.get_peft_model(toy(), LoraConfig(r=4, target_modules=TARGETS, fan_in_fan_out=True), "a")
    model.add_adapter(
        "b",
        LoraConfig(
            **{"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "fan_in_fan_out": True, **settings}
        ),
    )
    model.set_adapter(["a", "b"])
    shake(model)
    model.save_pretrained(tmp_path)
    libraries = []
    for library in (peftrs, peft):
        loaded: Any = library.PeftModel.from_pretrained(toy(), tmp_path / "a", "a")
        loaded.load_adapter(tmp_path / "b", "b")
        libraries.append(loaded)
    return libraries[0], libraries[1]


def changes(model: Any) -> dict[str, Tensor]:
    named = {name: model.base_model.model.get_submodule(name) for name in TARGETS}
    return {name: layer.get_delta_weight("sum").detach().double() for name, layer in named.items()}


@pytest.fixture
def even_dice(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes random pruning draw from a generator of its own, which is set back for each library."""
    generator, draw = torch.Generator(), torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda chances: draw(chances, generator=generator))
    return lambda: generator.manual_seed(7)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.5, -0.25]], ids=["mean", "difference"])
@pytest.mark.parametrize("kind", PEFTS)
def test_every_combination_is_theirs(
    kind: str, weights: list[float], tmp_path: Path, mixing: None, even_dice: Any
) -> None:
    found = []
    for model in adapters(tmp_path):
        even_dice()
        options = {"combination_type": kind, "svd_rank": 3}
        if kind not in weighted.SUMS:
            options |= {"density": 0.5, "majority_sign_method": "frequency" if weights[1] < 0 else "total"}
        model.base_model.add_weighted_adapter(["a", "b"], weights, "sum", **options)
        found.append(changes(model))
    ours, theirs = found
    for name, delta in theirs.items():
        assert (ours[name] - delta).norm() <= 1e-5 * delta.norm(), name


def test_linear_says_once_what_it_is(tmp_path: Path, mixing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighted, "_told", set())
    model, _ = adapters(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("one", "two"):
            model.add_weighted_adapter(["a", "b"], [0.5, 0.5], name, combination_type="linear")
    told = [str(one.message) for one in caught if issubclass(one.category, PeftrsWarning)]
    assert len(told) == 1
    assert "is not the weighted sum" in told[0]


@pytest.mark.parametrize("name", ["task_arithmetic", "magnitude_prune", "dare_linear", "ties", "dare_ties"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_task_vectors_are_merged_to_the_same_bits(name: str, density: float, sign: str) -> None:
    tensors = [torch.randn(5, 4, 3).mul(8).round() / 8 for _ in range(3)]
    weights = torch.tensor([0.5, -1.25, 2.0])
    options: dict[str, Any] = {} if name == "task_arithmetic" else {"density": density}
    if name.endswith("ties"):
        options["majority_sign_method"] = sign
    if density == 0 and name.startswith("dare"):
        return
    results = []
    for library in (task_vectors, merge_utils):
        torch.manual_seed(3)
        results.append(getattr(library, name)(tensors, weights, **options))
    assert torch.equal(*results)


def test_random_pruning_keeps_the_expectation() -> None:
    ones = torch.ones(200_000)
    kept = task_vectors.prune(ones, 0.2, "random", rescale=True)
    assert abs(float(kept.mean()) - 1) < 0.02
    assert abs(float((kept != 0).float().mean()) - 0.2) < 0.005


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: task_vectors.prune(t, -0.1, "random"), "Density should be >= 0"),
        (lambda t: task_vectors.prune(t, 0.5, "some"), "Unknown method some"),
        (lambda t: task_vectors.calculate_majority_sign_mask(t, "most"), "is not 'total' or 'frequency'"),
    ],
)
def test_what_cannot_be_pruned_is_refused(call: Any, words: str) -> None:
    with pytest.raises(peftrs.AdapterError, match=words):
        call(torch.ones(3))
