"""QA-LoRA: the two views agree, and the forward is PEFT's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from peftrs import ConfigError, LoraConfig, PeftModel, get_peft_model


def adapted(**options: Any) -> tuple[Any, Any]:
    """A layer with an adapter that is not at its first values."""
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(48, 20)),
        LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_qalora=True, qalora_group_size=8, **options),
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    return model, layer


def test_both_views_agree_and_the_change_is_constant_in_groups() -> None:
    model, layer = adapted(lora_bias=True)
    assert layer.lora_A["default"].weight.shape == (4, 6)
    assert layer.qalora_group_size["default"] == 8
    x = torch.randn(2, 5, 48)
    y = model(x)
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(delta, delta[:, ::8].repeat_interleave(8, 1))
    weight, bias = layer.folded()
    torch.testing.assert_close(y, functional.linear(x, weight, bias))
    torch.testing.assert_close(model.merge_and_unload()(x), y)


def test_forward_is_that_of_peft() -> None:
    from peft.tuners.lora.variants import QALoraLinearVariant

    model, layer = adapted()
    held = SimpleNamespace(
        lora_A=layer.lora_A, lora_B=layer.lora_B, lora_dropout={"default": nn.Identity()},
        scaling=layer.scaling,
        qalora_group_size={"default": 8}, training=False, in_features=48,
    )  # fmt: skip
    x = torch.randn(2, 5, 48)
    expected = QALoraLinearVariant.forward(held, active_adapter="default", x=x, result=layer.base_layer(x))
    torch.testing.assert_close(model(x), expected)


def test_saving_and_loading(tmp_path: Path) -> None:
    model, layer = adapted()
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(nn.Sequential(layer.base_layer), tmp_path)
    x = torch.randn(3, 48)
    assert torch.equal(other(x), model(x))


def test_what_does_not_go_is_refused() -> None:
    with pytest.raises(ConfigError, match="`use_qalora` goes neither"):
        LoraConfig(use_qalora=True, use_dora=True)
    with pytest.raises(ConfigError, match="`use_qalora` goes neither"):
        LoraConfig(use_qalora=True, init_lora_weights="pissa")
    with pytest.raises(ConfigError, match="48 inputs are not a multiple of qalora_group_size=7"):
        get_peft_model(
            nn.Sequential(nn.Linear(48, 20)),
            LoraConfig(target_modules=["0"], use_qalora=True, qalora_group_size=7),
        )


def test_combining_gives_a_plain_lora() -> None:
    model, layer = adapted()
    model.add_weighted_adapter(["default"], [2.0], "twice", combination_type="exact")
    assert model.peft_config["twice"].use_qalora is False
    x = torch.randn(3, 48)
    once = model(x) - layer.base_layer(x)
    model.set_adapter("twice")
    torch.testing.assert_close(model(x) - layer.base_layer(x), 2 * once)
