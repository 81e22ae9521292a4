"""accelerate over peftrs: prepared training, mixed precision, two processes, saved states, models kept on the
CPU or on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.launchers import debug_launcher
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import is_peft_model
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.data import DataLoader

from tests.ecosystem.tiny import distance, llama, stir

TOKENS = torch.arange(64).remainder(24).view(8, 8)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def adapted(**settings: Any) -> PeftModel:
    return get_peft_model(
        llama(),
        LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}),
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def prepared(
    accelerator: Accelerator, rows: torch.Tensor = TOKENS, batch: int = 4, rate: float = 0.1
) -> tuple[Any, Any, Any]:
    model = adapted()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=rate)
    return accelerator.prepare(model, optimizer, DataLoader(list(rows), batch_size=batch))


def train(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> list[float]:
    losses = []
    model.train()
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def half(folder: str) -> None:
    """One of two processes: it sees every other batch, and keeps what it has learnt."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model, optimizer, loader = prepared(accelerator, batch=2)
    assert is_peft_model(model)
    losses = train(accelerator, model, optimizer, loader)
    inner = accelerator.unwrap_model(model)
    assert isinstance(inner, PeftModel)
    torch.save((trained(inner), losses), f"{folder}/{accelerator.process_index}.pt")
    accelerator.save_state(f"{folder}/state")
    inner.save_pretrained(
        f"{folder}/adapter",
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(model),
    )
    accelerator.wait_for_everyone()
    stir(inner)
    accelerator.load_state(f"{folder}/state")
    assert all(
        torch.equal(value, trained(inner)[name]) for name, value in torch.load(f"{folder}/0.pt")[0].items()
    )


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    debug_launcher(half, (str(tmp_path),), num_processes=2)
    (first, one), (second, other) = (torch.load(tmp_path / f"{place}.pt") for place in (0, 1))
    assert one != other
    accelerator = Accelerator(cpu=True)
    # The batches of two processes lie one after the other: together they are the batch of one.
    model, optimizer, loader = prepared(accelerator, batch=4)
    train(accelerator, model, optimizer, loader)
    for name, value in trained(model).items():
        assert torch.equal(first[name], second[name])
        assert distance(first[name], value) < 1e-5, name
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert distance(logits(loaded), logits(model)) < 1e-4


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_state_is_saved_and_taken_up_again(precision: str, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model, optimizer, loader = prepared(accelerator)
    assert is_peft_model(model)
    first = train(accelerator, model, optimizer, loader)
    accelerator.save_state(str(tmp_path / "state"))
    second = train(accelerator, model, optimizer, loader)
    after = trained(model)
    accelerator.load_state(str(tmp_path / "state"))
    assert train(accelerator, model, optimizer, loader) == second
    assert sum(second) < sum(first)
    assert all(torch.equal(value, after[name]) for name, value in trained(model).items())
    assert {value.dtype for value in after.values()} == {torch.float32}
    inner = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    inner.save_pretrained(tmp_path / "adapter", state_dict=accelerator.get_state_dict(model))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), logits(inner))


MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
}
MAP |= {"lm_head": "disk"}


def offloaded(kind: str, model: Any, folder: Path) -> Any:
    """The model with weights that are elsewhere between calls."""
    cpu = torch.device("cpu")
    if kind == "cpu":
        return cpu_offload(model, execution_device=cpu)
    if kind == "disk":
        return disk_offload(model, str(folder), execution_device=cpu)
    return dispatch_model(model, MAP, main_device="cpu", offload_dir=str(folder), force_hooks=True)


CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], init_lora_weights=False),
    "dora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False),
    "pissa": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "whole": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", ["cpu", "disk", "map"])
def test_adapters_on_offloaded_models(kind: str, method: str, tmp_path: Path) -> None:
    plain = logits(llama())
    there = get_peft_model(llama(), CONFIGS[method])
    stir(there)
    expected = logits(there)
    there.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(offloaded(kind, llama(), tmp_path / "offload"), tmp_path / "adapter")
    layer = next(
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and module.spec.kind == "linear"
    )
    assert any(one.is_meta for one in model.parameters())
    assert not any(
        value.is_meta for name, value in model.named_parameters() if "lora_" in name or "ia3_" in name
    )
    assert distance(logits(model), expected) < 1e-5
    with model.disable_adapter():
        assert distance(logits(model), plain) < 1e-6
    model.merge_adapter()
    assert distance(logits(model), expected) < 1e-4
    assert layer.merged
    assert layer.get_base_layer().weight.is_meta
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert distance(logits(model), expected) < 1e-5
    merged = model.merge_and_unload()
    assert distance(logits(merged), expected) < 1e-4


@pytest.mark.parametrize("kind", ["cpu", "disk", "map"])
def test_a_fresh_adapter_trains_on_an_offloaded_model(kind: str, tmp_path: Path) -> None:
    losses = []
    for model in (llama(), offloaded(kind, llama(), tmp_path)):
        torch.manual_seed(3)
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        optimizer = torch.optim.SGD([one for one in tuned.parameters() if one.requires_grad], lr=0.5)
        for _ in range(3):
            loss = tuned(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    assert losses[2] < losses[0]
    assert losses[:3] == pytest.approx(losses[3:], abs=1e-5)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_adapted_models_are_offloaded_with_their_adapters(kind: str, tmp_path: Path) -> None:
    model = adapted(init_lora_weights=False)
    expected = logits(model)
    offloaded(kind, model, tmp_path)
    assert all(value.is_meta for name, value in model.named_parameters())
    assert distance(logits(model), expected) < 1e-6
