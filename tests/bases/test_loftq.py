"""LoftQ: a base rounded to what quantizing makes of it, and factors that make up for that; from weights, or
from a checkpoint.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftrs import (
    AdapterError,
    CheckpointError,
    ConfigError,
    LoftQConfig,
    LoraConfig,
    PeftModel,
    PeftrsWarning,
    get_peft_model,
    replace_lora_weights_loftq,
)
from peftrs.bases.bnb import rounded
from tests.bases.formats import FORMATS, library

pytest.importorskip("bitsandbytes")

RANK = 4


class Two(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(64, 96, bias=False), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(torch.tanh(self.below(x)))


def config(bits: int = 4, rounds: int = 1, **options: Any) -> LoraConfig:
    """A LoRA that starts by LoftQ, with a scaling other than 1."""
    settings = LoftQConfig(loftq_bits=bits, loftq_iter=rounds)
    return LoraConfig(
        r=RANK,
        lora_alpha=12,
        target_modules=["below", "above"],
        init_lora_weights="loftq",
        loftq_config=settings,
        **options,
    )


def change(layer: Any, adapter: str = "default") -> Tensor:
    """What the adapter adds to the weight."""
    fitted = layer.adapters[adapter]
    return (fitted.scaling * fitted["lora_B.weight"] @ fitted["lora_A.weight"]).detach()


def truncated(residual: Tensor) -> float:
    """How far the best matrix of the rank stays from the residual."""
    return float(torch.linalg.svdvals(residual)[RANK:].square().sum().sqrt())


@pytest.mark.parametrize("bits", [4, 8])
def test_one_round_is_the_best_approximation_of_the_residual(bits: int) -> None:
    model = Two()
    before = {name: getattr(model, name).weight.detach().clone() for name in ("below", "above")}
    peft: Any = get_peft_model(model, config(bits))
    for name, weight in before.items():
        layer = getattr(peft.base_model.model, name)
        quantized = rounded(weight, bits)
        assert torch.equal(layer.base_layer.weight, quantized)
        left = float((weight - quantized - change(layer)).norm())
        assert left == pytest.approx(truncated(weight - quantized), rel=1e-3)
        assert left < float((weight - quantized).norm())


def test_further_rounds_come_nearer() -> None:
    weight = nn.Linear(64, 96).weight.detach()
    found = []
    for rounds in (1, 3):
        model = Two()
        model.below.weight = nn.Parameter(weight.clone())
        peft: Any = get_peft_model(model, config(rounds=rounds))
        layer = peft.base_model.model.below
        found.append(float((weight - layer.base_layer.weight - change(layer)).norm()))
    assert found[1] < found[0]


def test_dora_starts_at_the_lengths_of_what_it_changes() -> None:
    peft: Any = get_peft_model(Two(), config(use_dora=True))
    layer = peft.base_model.model.below
    lengths = (layer.base_layer.weight + change(layer)).norm(dim=1)
    torch.testing.assert_close(layer.adapters["default"]["lora_magnitude_vector"], lengths)


def test_loading_rounds_the_base_again(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Two()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft = get_peft_model(model, config())
    x = torch.randn(3, 64)
    expected = peft(x)
    peft.save_pretrained(tmp_path)
    other = Two()
    other.load_state_dict(state)
    assert torch.equal(PeftModel.from_pretrained(other, tmp_path)(x), expected)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = Two()
    names = {name for name, _ in model.named_parameters()}
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        get_peft_model(model, config())
    assert {name for name, _ in model.named_parameters()} == names


def test_what_does_not_go_is_refused_before_anything_changes() -> None:
    with pytest.raises(ConfigError, match="needs `loftq_config`"):
        LoraConfig(init_lora_weights="loftq")
    with pytest.raises(ConfigError, match="`loftq_bits` is 2"):
        config(2)
    with pytest.raises(ConfigError, match="`loftq_iter` is 0"):
        config(4, 0)
    with pytest.raises(ConfigError, match=r"divides by the scaling, which lora_alpha=0 makes 0\.0"):
        get_peft_model(Two(), LoraConfig(target_modules=["below"], lora_alpha=0, init_lora_weights="pissa"))
    with pytest.warns(PeftrsWarning, match="ignored"):
        assert LoraConfig(loftq_config=LoftQConfig()).loftq_config == {}
    model = Two()
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["above"]))
    first = model.below.weight.clone()
    with pytest.raises(ConfigError, match="other adapters are for the weights"):
        peft.add_adapter("second", config())
    assert torch.equal(model.below.weight, first)


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-int8", "hqq-4", "torchao-int4"])
def test_replacing_from_the_checkpoint(name: str, tmp_path: Path) -> None:
    pytest.importorskip(library(name))
    model = Two()
    whole = {f"{key}.weight": getattr(model, key).weight.detach().clone() for key in ("below", "above")}
    save_file(whole, tmp_path / "model.safetensors")
    model.below, model.above = FORMATS[name](model.below), FORMATS[name](model.above)
    with pytest.raises(ConfigError, match="replace_lora_weights_loftq"):
        get_peft_model(model, config())
    peft: Any = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=12, target_modules=["below", "above"]))
    layers = [peft.base_model.model.below, peft.base_model.model.above]
    seen = []
    replace_lora_weights_loftq(
        peft, tmp_path, callback=lambda _, layer: (seen.append(layer), layer == "below")[1]
    )
    assert seen == ["below", "above"]
    assert not bool(change(layers[1]).any())
    replace_lora_weights_loftq(peft, tmp_path)
    for layer, weight in zip(layers, whole.values(), strict=True):
        residual = weight - layer.base.dense(layer.base_layer).weight
        assert float((residual - change(layer)).norm()) == pytest.approx(truncated(residual), rel=1e-3)


def test_replacing_names_all_that_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = Two()
    save_file({"below.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match="no LoRA over a quantized layer"):
        replace_lora_weights_loftq(get_peft_model(Two(), LoraConfig(target_modules=["below"])), tmp_path)
    quantize = FORMATS["bnb-nf4"]
    model.below, model.above = quantize(model.below), quantize(model.above)
    peft = get_peft_model(model, LoraConfig(r=RANK, target_modules=["below", "above"]))
    with pytest.raises(
        CheckpointError,
        match=r"below.weight has the shape \(3, 3\), not \(96, 64\); above.weight is not there",
    ):
        replace_lora_weights_loftq(peft, tmp_path)
    with pytest.raises(CheckpointError, match="model_path="):
        replace_lora_weights_loftq(peft)
