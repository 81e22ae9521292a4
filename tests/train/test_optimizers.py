"""Optimizers for LoRA: their groups and steps are PEFT's from the same start, and what they do not fit is
refused.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import peft.optimizers
import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

import peftrs
from peftrs import AdapterError, LoraConfig, PeftrsWarning
from peftrs.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peftrs.train.lora_fa import LoraFAOptimizer
from tests.model.tiny import TOKENS, bert, llama, shake

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
OPTIONS: dict[str, Any] = {
    "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "embed_tokens"],
    "alpha_pattern": {"v_proj": 12},
    "modules_to_save": ["model.norm"],
}  # fmt: skip


def pair(**more: Any) -> tuple[Any, Any]:
    """The same adapter on the same model, of either library."""
    theirs, ours = (
        lib.get_peft_model(llama(), lib.LoraConfig(**copy.deepcopy(OPTIONS | more))) for lib in (peft, peftrs)
    )
    shake(theirs)
    with torch.no_grad():
        own = dict(ours.named_parameters())
        assert own.keys() == dict(theirs.named_parameters()).keys()
        for name, parameter in theirs.named_parameters():
            own[name].copy_(parameter)
    return theirs, ours


def step(model: Any, optimizer: Optimizer, count: int = 3) -> dict[str, torch.Tensor]:
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora" in name or "norm" in name
    }


def same(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], tolerance: float) -> None:
    assert theirs.keys() == ours.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_lora_plus_has_their_groups_and_steps() -> None:
    theirs, ours = pair(modules_to_save=["lm_head"])
    options = {
        "lr": 1e-2,
        "loraplus_lr_ratio": 8.0,
        "loraplus_weight_decay": 0.1,
        "loraplus_lr_embedding": 5e-3,
    }
    other = peft.optimizers.create_loraplus_optimizer(theirs, AdamW, **options)
    own = create_loraplus_optimizer(ours, AdamW, **options)
    assert isinstance(own, AdamW)
    for one, two in zip(own.param_groups, other.param_groups, strict=True):
        assert (one["lr"], one["weight_decay"]) == (two["lr"], two["weight_decay"])
        assert [parameter.shape for parameter in one["params"]] == [
            parameter.shape for parameter in two["params"]
        ]
    same(step(theirs, other), step(ours, own), 1e-6)


def test_lora_plus_lets_no_norm_decay() -> None:
    _, model = pair()
    *_, last = create_loraplus_optimizer(
        model, AdamW, lr=1e-2, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    ).param_groups
    assert [parameter.shape for parameter in last["params"]] == [(32,)]
    assert (last["weight_decay"], last["lr"]) == (0.0, 0.08)


def test_riemannian_steps_are_theirs() -> None:
    theirs, ours = pair()
    options = {"lr": 0.1, "reg": 1e-2, "momentum": 0.9}
    other = peft.optimizers.create_riemannian_optimizer(theirs, SGD, **options)
    own = create_riemannian_optimizer(ours, SGD, **options)
    assert isinstance(own, SGD)
    before = {
        name: parameter.detach().clone() for name, parameter in ours.named_parameters() if "lora_A" in name
    }
    after = step(ours, own)
    same(step(theirs, other), after, 1e-5)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_riemannian_steps_do_not_depend_on_the_scale_of_the_factors() -> None:
    deltas = []
    for factor in (1.0, 10.0):
        model = peftrs.get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
        shake(model)
        layers = [one for name, one in model.named_modules() if name.endswith("q_proj")]
        with torch.no_grad():
            for layer in layers:
                layer.lora_A["default"].weight.mul_(factor)
                layer.lora_B["default"].weight.div_(factor)
        before = [layer.get_delta_weight("default").detach() for layer in layers]
        step(model, create_riemannian_optimizer(model, SGD, lr=1e-1, reg=0.0), 1)
        deltas.append(
            [
                layer.get_delta_weight("default").detach() - old
                for layer, old in zip(layers, before, strict=True)
            ]
        )
    for one, other in zip(*deltas, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-3 * one.abs().max().item())


def test_lora_fa_steps_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair()
    # Theirs projects in bfloat16 where it can, whose rounding AdamW's first steps show.
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    other = peft.optimizers.create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=1e-2, weight_decay=0.1)
    own = create_lorafa_optimizer(ours, r=4, lora_alpha=6, lr=1e-2, weight_decay=0.1)
    first = {name: one.detach().clone() for name, one in ours.named_parameters() if "lora_A" in name}
    after = step(ours, own)
    same(step(theirs, other), after, 1e-5)
    assert all(torch.equal(first[name], after[name]) for name in first)
    assert not any(one.requires_grad for name, one in ours.named_parameters() if "lora_A" in name)


def test_lora_fa_projects_by_each_layers_own_scaling() -> None:
    _, model = pair()
    optimizer: Any = create_lorafa_optimizer(model, r=1, lora_alpha=1, lr=1.0)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, layer in (
        (name, one) for name, one in model.named_modules() if name.endswith(("q_proj", "v_proj"))
    ):
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scaling = 12 / 4 if name.endswith("v_proj") else 6 / 4
        wanted = up.grad.double() @ torch.linalg.inv(down.double() @ down.double().mT) / scaling**2
        torch.testing.assert_close(optimizer._projected(up).double(), wanted, rtol=1e-3, atol=1e-6)


def test_its_state_is_saved_and_loaded() -> None:
    _, model = pair()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2)
    step(model, optimizer, 2)
    other = copy.deepcopy(model)
    again = create_lorafa_optimizer(other, r=4, lora_alpha=6, lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    same(step(model, optimizer, 2), step(other, again, 2), 0)


def test_what_does_not_fit_is_refused() -> None:
    _, model = pair()
    with pytest.raises(AdapterError, match="say otherwise"):
        create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2, use_rslora=True)
    with pytest.warns(PeftrsWarning, match="leave it out"):
        create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2, use_rslora=False)
    with pytest.raises(ValueError, match="did not find any trainable"):
        create_riemannian_optimizer(bert(), SGD, lr=0.1)
    _, model = pair()
    with pytest.raises(TypeError, match="must be a subclass"):
        create_riemannian_optimizer(model, int, lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="requires a closure"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=0.1)
    with pytest.raises(ValueError, match="does not support closures"):
        create_riemannian_optimizer(model, SGD, lr=0.1).step(lambda: 0.0)
    with pytest.raises(ValueError, match="lr -1"):
        LoraFAOptimizer([torch.nn.Parameter(torch.zeros(1))], lr=-1)
