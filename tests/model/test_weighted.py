"""Weighted sums of adapters are what they say: sums of the changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftrs
from peftrs import AdapterError, IA3Config, LoraConfig
from peftrs.core.tree import adapted_layers
from peftrs.methods.combine import stacked, truncated
from tests.model.tiny import Stack, llama, shake, stack

WEIGHTS = {"a": 0.5, "b": -2.0}


def two() -> Any:
    """A LoRA and one that starts from the base weights, on overlapping layers, of different ranks and scalings."""
    model = peftrs.get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}), "a")
    model.add_adapter("b", LoraConfig(r=4, target_modules=["q_proj", "o_proj"], use_rslora=True, init_lora_weights="olora"))
    model.set_adapter(["a", "b"])
    shake(model)
    return model


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {layer.spec.name: layer.get_delta_weight(name).detach() for layer in adapted_layers(model) if name in layer.adapters}


def summed(model: nn.Module) -> dict[str, Tensor]:
    parts = {name: deltas(model, name) for name in WEIGHTS}
    layers = {layer for part in parts.values() for layer in part}
    zero = torch.zeros(())
    return {layer: sum((WEIGHTS[name] * parts[name].get(layer, zero) for name in WEIGHTS), zero) for layer in layers}


@pytest.mark.parametrize(("kind", "rank"), [("cat", None), ("linear", None), ("svd", 40)])
def test_a_sum_of_full_rank_is_exact(kind: str, rank: int | None) -> None:
    model = two()
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type=kind, svd_rank=rank)
    found, expected = deltas(model, "sum"), summed(model)
    assert found.keys() == expected.keys()
    for layer, delta in found.items():
        torch.testing.assert_close(delta, expected[layer], rtol=1e-4, atol=2e-6)


def test_a_smaller_rank_is_the_best_there_is() -> None:
    model = two()
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", svd_rank=2)
    expected = summed(model)
    for layer, delta in deltas(model, "sum").items():
        error = torch.linalg.matrix_norm(delta - expected[layer])
        least = torch.linalg.svdvals(expected[layer])[2:].norm()
        torch.testing.assert_close(error, least, rtol=1e-3, atol=1e-5)


def test_the_sum_is_saved_and_loaded_like_any_other(tmp_path: Any) -> None:
    model = two()
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="cat")
    assert model.active_adapters == ["a", "b"]
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".sum." in name)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = deltas(peftrs.PeftModel.from_pretrained(llama(), tmp_path / "sum"), "default")
    assert all(torch.equal(delta, again[layer]) for layer, delta in deltas(model, "sum").items())


def test_vectors_are_added_up() -> None:
    model = peftrs.get_peft_model(stack(), IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]), "a")
    model.add_adapter("b", IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    model.set_adapter(["a", "b"])
    shake(model)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum")
    for layer in adapted_layers(model):
        expected = sum((WEIGHTS[name] * layer.adapters[name]["ia3_l"] for name in WEIGHTS), torch.zeros(()))
        torch.testing.assert_close(layer.adapters["sum"]["ia3_l"].data, expected.detach())


class Tables(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.conv = nn.Conv1d(8, 8, 3)


def test_embeddings_convolutions_and_biases_are_summed() -> None:
    torch.manual_seed(0)
    model = peftrs.get_peft_model(Tables(), LoraConfig(target_modules=["table", "conv"]), "a")
    model.add_adapter("b", LoraConfig(r=4, target_modules=["table", "conv"], lora_bias=False))
    model.set_adapter(["a", "b"])
    shake(model)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="cat")
    expected = summed(model)
    for layer, delta in deltas(model, "sum").items():
        torch.testing.assert_close(delta, expected[layer], rtol=1e-4, atol=2e-6)
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"], lora_bias=True, lora_alpha=16), "a")
    shake(model)
    model.add_weighted_adapter(["a"], [3.0], "sum")
    (layer,) = adapted_layers(model)
    torch.testing.assert_close(layer.adapters["sum"]["lora_B.bias"], 6 * layer.adapters["a"]["lora_B.bias"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a", "zz"], [1, 1], "sum"), "Adapter zz not found"),
        ((["a", "b"], [1], "sum"), "2 adapters and 1 weights"),
        ((["a", "a"], [1, 1], "sum"), "each once"),
        (([], [], "sum"), "0 adapters"),
        ((["a", "b"], [1, 1], "a"), "already exists"),
        ((["a", "b"], [1, 1], "sum", "ties"), "not built yet"),
        ((["a", "b"], [1, 1], "sum", "mean"), "Invalid combination_type: mean"),
        ((["a", "b"], [1, 1], "sum", "svd", 0), "must be positive"),
    ],
)
def test_what_has_no_sum_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    model = two()
    before = set(model.state_dict())
    with pytest.raises(AdapterError, match=words):
        model.add_weighted_adapter(*arguments)
    assert set(model.state_dict()) == before
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (LoraConfig(target_modules=["0"], use_dora=True), LoraConfig(target_modules=["0"]), "use_dora"),
        (LoraConfig(target_modules=["0"]), IA3Config(target_modules=["0"], feedforward_modules=[]), "IA3"),
        (
            LoraConfig(target_modules=["0"], modules_to_save=["head"]),
            LoraConfig(target_modules=["0"], modules_to_save=["head"]),
            "each replace this module",
        ),
    ],
)
def test_kinds_that_do_not_add_up_are_refused(first: Any, second: Any, words: str) -> None:
    model = peftrs.get_peft_model(stack(), first, "a")
    model.add_adapter("b", second)
    with pytest.raises(AdapterError, match=words):
        model.add_weighted_adapter(["a", "b"], [1, 1], "sum")


def test_clamping_cuts_the_largest_entries() -> None:
    terms = [(torch.randn(8, 3), torch.randn(3, 6)), (torch.randn(8, 2), torch.randn(2, 6))]
    up, down = truncated(terms, 4)
    clamped = torch.cat([factor.flatten() for factor in truncated(terms, 4, clamp=0.9)])
    bound = clamped.abs().max()
    free = torch.cat([up.flatten(), down.flatten()])
    assert torch.equal(clamped, free.clamp(-bound, bound))
    assert not torch.equal(clamped, free)
    exact = stacked(terms)
    torch.testing.assert_close(truncated(terms, 7)[0] @ truncated(terms, 7)[1], exact[0] @ exact[1])
