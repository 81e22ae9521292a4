"""What a model's wrapped modules share goes with copies of them, and with nothing else."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from peftrs import LoraConfig, get_peft_model
from peftrs.core.inject import activation
from peftrs.core.tree import adapted_layers


def model() -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    config = {"r": 2, "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(target_modules=["0", "1"], modules_to_save=["2"], **config), "a")
    model.add_adapter("b", LoraConfig(target_modules=["0", "1"], modules_to_save=["2"], **config))
    return model


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_switched_alone_and_as_a_whole(copied: Callable[[Any], Any]) -> None:
    first, x = model(), torch.randn(2, 4)
    first.base_model.model[1].set_adapter("b")
    second = copied(first)
    assert second.base_model.model[1].active_adapters == ["b"]
    before = first(x)
    assert torch.equal(second(x), before)
    second.set_adapter("b")
    assert [layer.active_adapters for layer in adapted_layers(second)] == [["b"], ["b"]]
    assert trained(second) == {name.replace(".a.", ".b.") for name in trained(second)} != set()
    assert first.active_adapter == "a"
    assert torch.equal(first(x), before)
    with second.disable_adapter():
        assert torch.equal(first(x), before)
    members = activation(second.base_model.model).members
    assert len(members) == 3
    assert not {id(one) for one in members} & {id(one) for one in activation(first.base_model.model).members}


def test_a_copied_layer_leaves_its_model_behind() -> None:
    first = model()
    alone = copy.deepcopy(first.base_model.model[0])
    assert alone.activation.members == [alone]
    alone.activation.switch(active=("b",))
    assert first.active_adapter == "a"


def test_layers_that_are_gone_are_forgotten() -> None:
    first = model()
    inside = first.base_model.model
    state = activation(inside)
    assert len(state.members) == 3
    del inside[1]
    gc.collect()
    assert len(state.members) == 2
    assert state.adapters() == ["a", "b"]
    first.unload()
    del inside
    first = None
    gc.collect()
    assert state.members == []


def test_a_second_adapter_leaves_what_others_train_as_it_is() -> None:
    first = model()
    first.set_requires_grad("b")
    first.base_model.model[0].base_layer.bias.requires_grad_(True)
    before = trained(first)
    first.add_adapter("c", LoraConfig(target_modules=["0"], r=2))
    assert trained(first) == before
    first.set_adapter("c")
    assert trained(first) - {"base_model.model.0.base_layer.bias"} == {
        f"base_model.model.0.lora_{factor}.c.weight" for factor in "AB"
    }
