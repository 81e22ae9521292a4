"""Models whose weights accelerate keeps in the CPU's memory or on the disk: adapters over them do what they
do over others.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftrs
from peftrs.core import inject
from tests.model import tiny

accelerate = pytest.importorskip("accelerate")

METHODS: dict[str, Any] = {
    "lora": lambda: peftrs.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": lambda: peftrs.LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True),
    "pissa": lambda: peftrs.LoraConfig(target_modules=["v_proj"], init_lora_weights="pissa"),
    "embedding": lambda: peftrs.LoraConfig(target_modules=["embed_tokens", "q_proj"]),
    "ia3": lambda: peftrs.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "oft": lambda: peftrs.OFTConfig(target_modules=["q_proj", "up_proj"], oft_block_size=8),
}


def offloaded(place: str, folder: Path, *, tied: bool = False) -> nn.Module:
    """The tiny model with all weights kept elsewhere; what computes is the CPU."""
    model = tiny.llama(tied=tied)
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, folder / "offload", execution_device=torch.device("cpu"))
    assert all(one.is_meta for one in model.parameters())
    return model


def adapted(model: nn.Module, method: str) -> Any:
    torch.manual_seed(3)
    found = peftrs.get_peft_model(model, METHODS[method]())
    tiny.shake(found)
    return found


def losses(model: Any, steps: int = 2) -> list[float]:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    found = []
    for _ in range(steps):
        loss = model.train()(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_adapters_train_merge_and_unmerge(tmp_path: Path, place: str, method: str) -> None:
    whole, model = adapted(tiny.llama(), method), adapted(offloaded(place, tmp_path), method)
    assert {name: one.device.type for name, one in model.named_parameters() if one.requires_grad}.keys() == {
        name for name, one in whole.named_parameters() if one.requires_grad
    }
    assert (tiny.logits(model) - tiny.logits(whole)).abs().max() < 1e-6
    assert losses(model) == pytest.approx(losses(whole), abs=1e-6)
    before, base = tiny.logits(model), _base(model)
    model.merge_adapter()
    assert all(one.is_meta for name, one in model.named_parameters() if "base_layer" in name)
    assert (tiny.logits(model) - before).abs().max() < 1e-5
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model), before)
    assert torch.equal(_base(model), base)


def _base(model: Any) -> Tensor:
    with model.disable_adapter():
        return tiny.logits(model)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_adapter_becomes_part_of_weights_that_are_elsewhere(tmp_path: Path, place: str) -> None:
    model = adapted(offloaded(place, tmp_path), "lora")
    wanted = tiny.logits(model)
    merged = model.merge_and_unload()
    assert all(one.is_meta for one in merged.parameters())
    assert (tiny.logits(merged) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_adapters_are_saved_and_loaded(tmp_path: Path, place: str, low_cpu_mem_usage: bool) -> None:
    whole = adapted(tiny.llama(), "dora")
    whole.save_pretrained(tmp_path / "whole")
    model = peftrs.PeftModel.from_pretrained(
        offloaded(place, tmp_path), tmp_path / "whole", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert (tiny.logits(model) - tiny.logits(whole)).abs().max() < 1e-6
    model.load_adapter(tmp_path / "whole", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("second")
    assert (tiny.logits(model) - tiny.logits(whole)).abs().max() < 1e-6
    model.save_pretrained(tmp_path / "again", selected_adapters=["second"])
    again, first = (
        (tmp_path / path / "adapter_model.safetensors").read_bytes() for path in ("again/second", "whole")
    )
    assert again == first


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_is_put_away_with_its_adapter(tmp_path: Path, place: str) -> None:
    model = adapted(tiny.llama(), "lora")
    wanted = tiny.logits(model)
    model.save_pretrained(tmp_path / "before")
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
    assert (tiny.logits(model) - wanted).abs().max() < 1e-6
    model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "before" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "after" / "adapter_model.safetensors"
    ).read_bytes()
    other = adapted(tiny.llama(), "lora")
    tiny.shake(other, seed=9)
    other.save_pretrained(tmp_path / "other")
    model.load_adapter(tmp_path / "other", "default")
    assert (tiny.logits(model) - tiny.logits(other)).abs().max() < 1e-6


def test_weights_that_are_read_from_the_checkpoint_leave_it_alone(tmp_path: Path) -> None:
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this version of transformers copies the checkpoint")
    tiny.llama().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, device_map={"model.layers": "disk", **rest}
    )
    model = adapted(base, "lora")
    wanted = tiny.logits(model)
    with pytest.warns(peftrs.PeftrsWarning, match="changed weights are kept in") as told:
        model.merge_adapter()
    assert len(told) == 1
    folder = Path(str(told[0].message).split()[5])
    # Each in its file, and none in memory.
    assert len(list(folder.glob("*.dat"))) == 14
    assert (tiny.logits(model) - wanted).abs().max() < 1e-5
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model), wanted)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    del model, base
    gc.collect()
    assert not folder.exists()


def test_tied_weights_that_are_elsewhere_part_for_the_merge(tmp_path: Path) -> None:
    model = adapted(offloaded("cpu", tmp_path, tied=True), "embedding")
    wanted = tiny.logits(model)
    model.merge_adapter()
    assert (tiny.logits(model) - wanted).abs().max() < 1e-5


def test_first_values_are_computed_on_an_accelerator_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    accelerator = torch.device("cpu", 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator)
    monkeypatch.setattr(
        inject,
        "nearer",
        lambda device, config, real=inject.nearer: seen.append(real(device, config)) or seen[-1],
    )
    runtime = peftrs.LoraRuntimeConfig(ephemeral_gpu_offload=True)
    found = []
    for config in (
        peftrs.LoraConfig(target_modules=["q_proj"], use_dora=True, runtime_config=runtime),
        peftrs.LoraConfig(target_modules=["q_proj"], use_dora=True),
    ):
        torch.manual_seed(3)
        model = peftrs.get_peft_model(tiny.llama(), config)
        assert {str(one.device) for one in model.parameters()} == {"cpu"}
        found.append({name: one for name, one in model.named_parameters() if "lora" in name})
    assert seen[:2] == [accelerator] * 2
    assert seen[2:] == [torch.device("cpu")] * 2
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])
