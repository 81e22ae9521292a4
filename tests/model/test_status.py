"""The state of adapters as libraries and people ask for it."""

from __future__ import annotations

import pytest
import torch

import peftrs
import peftrs.ops
from peftrs import LoraConfig, OFTConfig, PeftrsError
from tests.model.tiny import llama, stack


def test_layers_tell_their_state() -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"], modules_to_save=["head"]))
    model.add_adapter("other", OFTConfig(r=0, oft_block_size=4, target_modules=["0", "1"]))
    first, second, head = model.get_layer_status()
    assert (first.name, second.name, head.name) == ("model.layers.0", "model.layers.1", "model.head")
    assert (first.module_type, head.module_type) == ("lora+oft.Linear", "ModulesToSaveWrapper")
    assert first.available_adapters == ["default", "other"]
    assert first.requires_grad == {"default": True, "other": False}
    assert second.available_adapters == ["other"]
    assert first.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert (first.enabled, first.active_adapters, first.merged_adapters) == (True, ["default"], [])
    assert peftrs.get_layer_status(model) == model.get_layer_status()


def test_the_model_tells_its_state() -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0", "1"]))
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("Stack", "LoraModel")
    assert status.peft_types == {"default": "LORA"}
    assert status.num_adapter_layers == 2
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_the_status_says_which_way_each_layer_runs_and_why() -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0", "1"]))
    hooked = model.get_submodule("base_model.model.layers.1.base_layer")
    handle = hooked.register_forward_hook(lambda *_: None)
    reason = "composite: the layer beneath has hooks"
    assert [layer.routes for layer in model.get_layer_status()] == [{"default": "fused"}, {"default": reason}]
    assert model.get_model_status().routes == {"fused": 1, reason: 1}
    handle.remove()
    with peftrs.ops.fused(False):
        assert model.get_model_status().routes == {"composite: fused operations are turned off": 2}
    with model.disable_adapter():
        assert model.get_model_status().routes == {}


def test_layers_that_disagree_are_irregular() -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0", "1"]))
    model.add_adapter("other", LoraConfig(target_modules=["0", "1"]))
    layer = model.get_base_model().layers[0]
    layer.lora_A["default"].weight.requires_grad_(False)
    assert model.get_layer_status()[0].requires_grad["default"] == "irregular"
    layer.merge()
    assert model.get_model_status().merged_adapters == "irregular"
    layer.unmerge()
    layer.set_adapter("other")
    layer.enable_adapters(False)
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.requires_grad["default"]) == ("irregular",) * 3


def test_bare_models_tell_their_state_too() -> None:
    model = llama()
    peftrs.inject_adapter_in_model(LoraConfig(), model)
    status = peftrs.get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == (
        "LlamaForCausalLM",
        "None",
        {},
    )
    assert status.num_adapter_layers == 4
    with pytest.raises(PeftrsError, match="No adapter layers found"):
        peftrs.get_model_status(torch.nn.Linear(2, 2))
