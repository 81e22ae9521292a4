"""Adapters made of others: sums are sums of the changes, of every kind of layer, and saved like any other
adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftrs
from peftrs import AdapterError, IA3Config, LoraConfig
from peftrs.convert.weighted import KINDS, SUMS
from peftrs.core.slots import FittedAdapter
from peftrs.core.tree import adapted_layers
from tests.interchange.cases import Toy
from tests.model.tiny import Stack, llama, shake, stack
from tests.ops.accounting import Largest

WEIGHTS = {"a": 0.5, "b": -2.0}
ALL = ["emb", "lin0", "lin1", "conv1", "conv2", "conv3"]


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def combine(model: Any, kind: str, **options: Any) -> None:
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type=kind, **options)


def two(base: Callable[[], nn.Module] = llama, *configs: LoraConfig) -> Any:
    """Two LoRAs on overlapping layers, of different ranks and scalings; the second starts from the base
    weights.
    """
    a, b = configs or (
        LoraConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}),
        LoraConfig(r=4, target_modules=["q_proj", "o_proj"], use_rslora=True, init_lora_weights="olora"),
    )
    model = peftrs.get_peft_model(base(), a, "a")
    model.add_adapter("b", b)
    model.set_adapter(["a", "b"])
    shake(model)
    return model


def everywhere() -> Any:
    parameters = ["exp.up", "exp.wide"]
    first = LoraConfig(r=3, target_modules=ALL, target_parameters=parameters, rank_pattern={"lin0": 5})
    second = LoraConfig(r=2, target_modules=ALL[:4], target_parameters=parameters[:1], use_rslora=True)
    return two(toy, first, second)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


def attention() -> Any:
    return two(Attending, LoraConfig(r=3, target_modules=["mha"]), LoraConfig(r=2, target_modules=["mha"]))


def _product(fitted: FittedAdapter) -> Tensor:
    up, down, *_ = fitted.method.term(fitted)
    return (up.double() @ down.double()).reshape(fitted.spec.shape).detach()


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What a LoRA adds to each weight, in float64."""
    found = {
        layer.spec.name: layer.adapters[name] for layer in adapted_layers(model) if name in layer.adapters
    }
    return {layer: fitted.scaling * _product(fitted) for layer, fitted in found.items()}


def summed(model: nn.Module) -> dict[str, Tensor]:
    parts = {name: deltas(model, name) for name in WEIGHTS}
    layers = {layer for part in parts.values() for layer in part}
    zero = torch.zeros((), dtype=torch.float64)
    return {
        layer: sum((WEIGHTS[name] * parts[name].get(layer, zero) for name in WEIGHTS), zero)
        for layer in layers
    }


def matrices(weight: Tensor) -> Tensor:
    """A stack of the matrices that a weight is, which of all but three bare dimensions is one."""
    return weight if weight.ndim == 3 and weight.shape[0] == 3 else weight.flatten(1).unsqueeze(0)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


makers = pytest.mark.parametrize("make", [two, everywhere, attention])


@makers
@pytest.mark.parametrize(("kind", "rank"), [("exact", None), ("cat", None), ("linear", None), ("svd", 40)])
def test_a_sum_of_full_rank_is_exact(make: Any, kind: str, rank: int | None) -> None:
    model = make()
    combine(model, kind, svd_rank=rank)
    found, expected = deltas(model, "sum"), summed(model)
    assert found.keys() == expected.keys()
    for layer, delta in found.items():
        assert apart(delta, expected[layer]) < 1e-6, layer


@pytest.mark.parametrize("kind", SUMS)
def test_a_sum_makes_no_matrix_of_a_weights_size(kind: str) -> None:
    rows, columns = 300, 200
    model = peftrs.get_peft_model(
        nn.Sequential(nn.Linear(columns, rows)), LoraConfig(r=3, target_modules=["0"]), "a"
    )
    model.add_adapter("b", LoraConfig(r=3, target_modules=["0"]))
    shake(model)
    with Largest() as largest:
        combine(model.base_model, kind)
    assert "sum" in model.peft_config
    assert largest.elements < rows * columns / 4


@makers
def test_a_smaller_rank_is_the_best_there_is(make: Any) -> None:
    model = make()
    combine(model, "svd", svd_rank=2)
    expected = summed(model)
    for layer, delta in deltas(model, "sum").items():
        whole, error = (matrices(tensor) for tensor in (expected[layer], delta - expected[layer]))
        least = torch.linalg.svdvals(whole)[:, 2:].norm(dim=1)
        assert (error.flatten(1).norm(dim=1) <= least + 1e-4 * whole.flatten(1).norm(dim=1)).all(), layer


@pytest.mark.parametrize("kind", ["exact", "cat", "linear", "svd"])
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"lora_bias": True, "lora_alpha": 16},
        {"rank_pattern": {"0": 2}, "alpha_pattern": {"1": 5}},
        {"init_lora_weights": "pissa"},
        {"r": 11},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_one_adapter_alone_is_itself(settings: dict[str, Any], kind: str) -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0", "1"], **settings), "a")
    shake(model)
    x = torch.randn(3, 8)
    before = model(x)
    model.add_weighted_adapter(["a"], [1.0], "same", combination_type=kind)
    model.set_adapter("same")
    assert apart(model(x), before) < 1e-6


@makers
def test_opposite_adapters_cancel_out(make: Any) -> None:
    model = make()
    model.add_weighted_adapter(["a"], [-1.0], "minus", combination_type="exact")
    model.add_weighted_adapter(["a", "minus"], [1.0, 1.0], "nothing", combination_type="exact")
    own = deltas(model, "a")
    assert all(delta.norm() < 1e-6 * own[layer].norm() for layer, delta in deltas(model, "nothing").items())


@makers
@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore:The following .*_pattern keys:RuntimeWarning"
)
def test_the_sum_is_saved_and_loaded_like_any_other(make: Any, tmp_path: Path) -> None:
    model = make()
    combine(model, "cat")
    assert model.active_adapters == ["a", "b"]
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".sum." in name)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    base, inputs = {
        two: (llama, torch.arange(12).view(2, 6)),
        everywhere: (toy, torch.arange(12).view(2, 6)),
        attention: (Attending, torch.randn(2, 3, 8)),
    }[make]
    again: Any = peftrs.PeftModel.from_pretrained(base(), tmp_path / "sum", strict=True)
    assert all(
        torch.equal(delta, deltas(again, "default")[layer]) for layer, delta in deltas(model, "sum").items()
    )
    frozen = {
        name: tensor for name, tensor in model.get_base_model().state_dict().items() if ".base_layer." in name
    }
    theirs: Any = peft.PeftModel.from_pretrained(base(), tmp_path / "sum")
    for loaded in (again, theirs):
        own = loaded.get_base_model().state_dict()
        loaded.get_base_model().load_state_dict({name: frozen.get(name, own[name]) for name in own})
    ours, others = (loaded.eval()(inputs) for loaded in (again, theirs))
    if make is two:
        ours, others = ours.logits, others.logits
    torch.testing.assert_close(ours, others, rtol=1e-5, atol=1e-6)


class Nested(nn.Module):
    """A layer whose name is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(8, 8)
        self.inner = Stack()
        self.inner.conv = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner.conv(self.conv(x)))


@pytest.mark.filterwarnings("ignore:.*trained on another model")  # of other random weights
def test_patterns_tell_layers_apart_whose_names_end_alike(tmp_path: Path) -> None:
    model = two(
        Nested,
        LoraConfig(r=4, target_modules=["inner.conv", "0", "1"]),
        LoraConfig(r=2, target_modules="conv|inner.layers.1"),
    )
    combine(model, "exact")
    assert {layer.spec.name: layer.r["sum"] for layer in adapted_layers(model)} == {
        "conv": 2, "inner.conv": 4, "inner.layers.0": 4, "inner.layers.1": 6,
    }  # fmt: skip
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    for library in (peftrs, peft):
        loaded: Any = library.PeftModel.from_pretrained(Nested(), tmp_path / "sum")
        assert loaded.base_model.model.conv.r["default"] == 2
        assert loaded.base_model.model.inner.conv.r["default"] == 4


def test_vectors_are_added_up() -> None:
    model = peftrs.get_peft_model(
        stack(), IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]), "a"
    )
    model.add_adapter("b", IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    model.set_adapter(["a", "b"])
    shake(model)
    combine(model, "svd")
    for layer in adapted_layers(model):
        expected = sum((WEIGHTS[name] * layer.adapters[name]["ia3_l"] for name in WEIGHTS), torch.zeros(()))
        torch.testing.assert_close(layer.adapters["sum"]["ia3_l"].data, expected.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_biases_are_put_together_too(kind: str) -> None:
    model = two(
        stack, *(LoraConfig(r=4, target_modules=["0"], lora_bias=True, lora_alpha=alpha) for alpha in (8, 4))
    )
    combine(model, kind, density=None if kind in SUMS else 1.0 - 1e-9)
    (layer,) = adapted_layers(model)
    a, b, found = (layer.adapters[name]["lora_B.bias"].detach() for name in ("a", "b", "sum"))
    if kind in SUMS:
        torch.testing.assert_close(found, 2 * 0.5 * a - 2.0 * b)
    else:
        assert not torch.equal(found, torch.zeros_like(found))


def test_tied_layers_stay_tied(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    other = LoraConfig(r=3, target_modules=["embed_tokens"], ensure_weight_tying=True, use_rslora=True)
    model = two(lambda: llama(tied=True), config, other)
    combine(model, "exact")
    found, expected = deltas(model, "sum"), summed(model)
    assert {"model.embed_tokens", "lm_head"} <= found.keys() == expected.keys()
    assert all(apart(delta, expected[layer]) < 1e-6 for layer, delta in found.items())
    model.save_pretrained(tmp_path, selected_adapters=["sum"], save_embedding_layers=False)
    again = deltas(
        peftrs.PeftModel.from_pretrained(llama(tied=True), tmp_path / "sum", strict=True), "default"
    )
    assert all(torch.equal(delta, again[layer]) for layer, delta in found.items())


def test_a_layer_that_is_tied_in_one_and_not_in_another_is_refused() -> None:
    tied = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = two(lambda: llama(tied=True), tied, LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
    before = set(model.state_dict())
    with pytest.raises(AdapterError, match="share the tensors of a tied layer"):
        combine(model, "exact")
    assert set(model.state_dict()) == before


def test_replaced_modules_come_along() -> None:
    model = two(
        stack,
        LoraConfig(target_modules=["0"], modules_to_save=["head"]),
        LoraConfig(target_modules=["1"]),
    )
    combine(model, "exact")
    head = model.base_model.model.head
    assert torch.equal(head.modules_to_save["sum"].weight, head.modules_to_save["a"].weight)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a", "zz"], [1, 1], "sum"), "Adapter zz not found"),
        ((["a", "b"], [1], "sum"), "2 adapters and 1 weights"),
        ((["a", "a"], [1, 1], "sum"), "each once"),
        (([], [], "sum"), "0 adapters"),
        ((["a", "b"], [1, float("nan")], "sum"), "not all finite"),
        ((["a", "b"], [1, 1], "a"), "already exists"),
        ((["a", "b"], [1, 1], "sum", "ties"), "needs a `density`"),
        ((["a", "b"], [1, 1], "sum", "dare_linear_svd", 2, None, True, None, 1.5), "needs a `density`"),
        ((["a", "b"], [1, 1], "sum", "ties_svd", 2, None, True, None, 0.5, "all"), "'total' or 'frequency'"),
        ((["a", "b"], [1, 1], "sum", "mean"), "Invalid combination_type: mean"),
        ((["a", "b"], [1, 1], "sum", "svd", 0), "must be positive"),
        ((["a", "b"], [1, 1], "sum", "svd", 2, 1.5), "must be a quantile"),
        ((["a", "b"], [1, 1], "sum", "ties", None, None, True, None, 0.5), "start from the base weights"),
    ],
)
def test_what_cannot_be_combined_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    model = two()
    before = set(model.state_dict())
    with pytest.raises(AdapterError, match=words):
        model.add_weighted_adapter(*arguments)
    assert set(model.state_dict()) == before
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize(
    ("first", "second", "kind", "words"),
    [
        (
            LoraConfig(target_modules="dummy-target-modules", modules_to_save=["head"]),
            LoraConfig(target_modules="dummy-target-modules", modules_to_save=["layers.0"]),
            "exact",
            "'a', 'b' change no layer",
        ),
        (
            LoraConfig(target_modules=["0"], use_dora=True),
            LoraConfig(target_modules=["0"]),
            "svd",
            "use_dora",
        ),
        (
            LoraConfig(target_modules=["0"]),
            IA3Config(target_modules=["0"], feedforward_modules=[]),
            "svd",
            "IA3",
        ),
        (
            LoraConfig(target_modules=["0"], modules_to_save=["head"]),
            LoraConfig(target_modules=["0"], modules_to_save=["head"]),
            "svd",
            "each replace this module",
        ),
        (
            LoraConfig(target_modules=["0"], r=4),
            LoraConfig(target_modules=["0"], r=2),
            "ties",
            "equal rank, and 'a' has 4, 'b' has 2",
        ),
    ],
)
def test_kinds_that_do_not_add_up_are_refused(first: Any, second: Any, kind: str, words: str) -> None:
    model = peftrs.get_peft_model(stack(), first, "a")
    model.add_adapter("b", second)
    with pytest.raises(AdapterError, match=words):
        model.add_weighted_adapter(["a", "b"], [1, 1], "sum", kind, density=0.5)
