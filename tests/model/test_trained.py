"""Which tensors are trained, after every step of chance sequences and where tensors or layers are
replaced.
"""

from __future__ import annotations

import copy
import gc
import random
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from peftrs import IA3Config, LoraConfig, get_peft_model
from peftrs.core.inject import activation
from peftrs.core.tree import wrappers
from peftrs.errors import PeftrsWarning

NAMES = ["a", "ab", "b", "c"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def config(chance: random.Random) -> Any:
    kinds: list[Any] = [
        LoraConfig(target_modules=["layers.0", "embed"], r=2, use_dora=chance.random() < 0.5),
        LoraConfig(
            target_modules=["layers.1"], r=2, modules_to_save=["head"], lora_bias=chance.random() < 0.5
        ),
        LoraConfig(
            target_modules=["layers.0", "layers.1"], r=2, init_lora_weights=chance.choice([True, "pissa"])
        ),
        LoraConfig(target_parameters=["layers.0.weight"], target_modules=[], r=2),
        IA3Config(target_modules=["layers.0", "layers.1"], feedforward_modules=["layers.0"]),
    ]
    return chance.choice(kinds)


def of(model: nn.Module, adapters: set[str]) -> set[int]:
    """The tensors that these adapters train, found without what finds them fast."""
    return {id(one) for _, held in wrappers(model) for name in adapters for one in held.tensors(name)}


def trained(model: nn.Module) -> set[int]:
    own = of(model, set(NAMES))
    return {id(one) for one in model.parameters() if one.requires_grad and id(one) in own}


@pytest.mark.parametrize("seed", range(12))
def test_after_any_steps_those_are_trained_that_were_chosen(seed: int) -> None:
    chance = random.Random(seed)
    model: Any = get_peft_model(Model(), LoraConfig(target_modules=["layers.0"], r=2), "a")
    wanted = {"a"}
    for _ in range(60):
        there = list(activation(model.get_base_model()).adapters())
        step = chance.choice(
            [
                "add",
                "switch",
                "switch",
                "freeze",
                "delete",
                "merge",
                "disable",
                "write",
                "cast",
                "layer",
                "copy",
            ]
        )
        if step == "add" and (free := [name for name in NAMES if name not in there]):
            model.add_adapter(chance.choice(free), config(chance), low_cpu_mem_usage=False)
        elif step == "switch":
            chosen, inference = chance.choice(there), chance.random() < 0.2
            model.set_adapter(chosen, inference_mode=inference)
            wanted = set() if inference else {chosen}
        elif step == "freeze":
            name, on = chance.choice(there), chance.random() < 0.5
            model.set_requires_grad(name, on)
            wanted = wanted | {name} if on else wanted - {name}
        elif step == "delete" and len(there) > 1:
            name = chance.choice(there)
            was_active = name in model.active_adapters
            with (
                pytest.warns(PeftrsWarning, match="was active and is deleted")
                if was_active
                else pytest.MonkeyPatch.context()
            ):
                model.delete_adapter(name)
            wanted = set(model.active_adapters) if was_active else wanted - {name}
        elif step == "merge":
            model.merge_adapter()
            model.unmerge_adapter()
        elif step == "disable":
            with model.disable_adapter():
                pass
            model.base_model.disable_adapter_layers()
            assert trained(model) == set()
            model.base_model.enable_adapter_layers()
            wanted = set(model.active_adapters)
        elif step == "write":
            # Behind the library's back; switching puts it right.
            for parameter in model.parameters():
                if parameter.is_floating_point() and chance.random() < 0.3:
                    parameter.requires_grad_(chance.random() < 0.5)
            chosen = chance.choice(there)
            model.set_adapter(chosen)
            wanted = {chosen}
        elif step == "cast":
            model.to(chance.choice([torch.float64, torch.float32]))
        elif step == "layer":
            chosen = chance.choice(there)
            for _, held in wrappers(model):
                held.set_adapter(chosen)
            model.set_adapter(chosen)
            wanted = {chosen}
        elif step == "copy":
            model = copy.deepcopy(model)
        assert trained(model) == of(model, wanted), step


def test_a_parameter_that_another_took_the_place_of_is_switched() -> None:
    model: Any = get_peft_model(Model(), LoraConfig(target_modules=["layers.0"], r=2), "a")
    model.add_adapter("b", LoraConfig(target_modules=["layers.0"], r=2))
    model.set_adapter("b")
    layer = model.base_model.model.layers[0]
    for name in ("a", "b"):
        layer.lora_A[name].weight = nn.Parameter(torch.zeros(2, 4))
    model.set_adapter("a")
    assert trained(model) == of(model, {"a"})
    assert not layer.lora_A["b"].weight.requires_grad


def test_a_slot_that_came_later_is_switched() -> None:
    model: Any = get_peft_model(Model(), LoraConfig(target_modules=["layers.0"], r=2), "a")
    model.set_adapter("a", inference_mode=True)
    fitted = model.base_model.model.layers[0].adapters["a"]
    fitted["lora_B.bias"] = nn.Parameter(torch.zeros(4), requires_grad=False)
    model.set_adapter("a")
    assert fitted["lora_B.bias"].requires_grad


def test_tensors_of_an_adapter_that_is_gone_are_not_kept() -> None:
    model: Any = get_peft_model(Model(), LoraConfig(target_modules=["layers.0"], r=2), "a")
    model.add_adapter("b", LoraConfig(target_modules=["layers.0"], r=2))
    model.set_adapter("a")
    tensor = weakref.ref(model.base_model.model.layers[0].lora_A["b"].weight)
    model.delete_adapter("b")
    gc.collect()
    assert tensor() is None


def test_tensors_of_a_layer_that_is_gone_are_not_kept() -> None:
    model: Any = get_peft_model(Model(), LoraConfig(target_modules=["layers.0", "layers.1"], r=2), "a")
    model.set_adapter("a")
    tensor = weakref.ref(model.base_model.model.layers[1].lora_A["a"].weight)
    del model.base_model.model.layers[1]
    gc.collect()
    assert tensor() is None
    model.set_adapter("a")
