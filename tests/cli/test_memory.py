"""What `peftrs targets` says of the memory that training takes, held to what torch's allocator hands out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peftrs
from peftrs._native import tool_main
from peftrs.cli import _by_class, _extract, _memory
from peftrs.train import memory

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 3,
}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **SIZES, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True
            )
        ),
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=2000, n_embd=256, n_layer=3, n_head=8)
        ),
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "bert": (
        lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(**SIZES, num_attention_heads=8)
        ),
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    ),
}


def measured(model: Any, tokens: torch.Tensor) -> int:
    """The most that the allocator had handed out at once beside the model in a step, by its own record."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        memory.loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
    for one in model.parameters():
        one.grad = None
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(
        (event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def report(tmp_path: Path, capfd: pytest.CaptureFixture[str], *options: str) -> Any:
    capfd.readouterr()
    arguments = ["targets", str(tmp_path / "base"), "--config", str(tmp_path / "config"), *options]
    assert tool_main(arguments, _by_class, _extract, _memory) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("name", MODELS)
def test_a_step_takes_what_the_plan_says(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    build, settings = MODELS[name]
    base, config = build(), peftrs.LoraConfig(**settings)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "config").mkdir()
    config.save_pretrained(tmp_path / "config")
    said = json.loads(report(tmp_path, capfd, "--batch", "2", "--seq", "96", "--json"))["memory"]
    model = peftrs.get_peft_model(base, peftrs.LoraConfig(**settings)).train()
    held = {id(one): one.nbytes for one in (*model.parameters(), *model.buffers())}
    assert said["weights"] + said["adapter"] == pytest.approx(sum(held.values()), rel=0.1)
    trained = sum(one.nbytes for one in model.parameters() if one.requires_grad)
    assert (said["gradients"], said["optimizer"]) == (trained, 2 * trained)
    tokens = torch.randint(0, 2000, (2, 96))
    for kind in ("", "_checkpointed"):
        if kind:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        step = measured(model, tokens)
        assert said[f"activations{kind}"] + said["gradients"] == pytest.approx(step, rel=0.1)
        total = sum(held.values()) + said["optimizer"] + step
        assert said[f"total{kind}"] == pytest.approx(total, rel=0.1)


def test_what_quantizing_and_other_optimizers_save(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build, settings = MODELS["llama"]
    base = build()
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    (tmp_path / "config").mkdir()
    peftrs.LoraConfig(**settings).save_pretrained(tmp_path / "config")
    batch = ("--batch", "1", "--seq", "32", "--json")
    plain, four, double, eight = (
        json.loads(report(tmp_path, capfd, *batch, *more))["memory"]
        for more in (
            (),
            ("--quant", "nf4"),
            ("--quant", "nf4-double", "--optimizer", "adamw8bit"),
            ("--quant", "int8"),
        )
    )
    linear = sum(
        one.weight.numel()
        for name, one in base.named_modules()
        if isinstance(one, torch.nn.Linear) and name != "lm_head"
    )
    assert plain["weights"] - four["weights"] == linear * 2 - linear // 2 - linear // 16
    assert four["weights"] > double["weights"]
    assert eight["weights"] > four["weights"]
    assert double["optimizer"] < plain["optimizer"]
    text = report(tmp_path, capfd, *batch[:-1], "--quant", "nf4")
    assert "memory of training, 1 x 32 tokens" in text
    assert "in all with gradient checkpointing" in text


def test_bitsandbytes_takes_what_the_plan_says() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(96, 128)
    for kind in ("nf4", "nf4-double"):
        _, state = bnb.functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=kind.endswith("double")
        )
        scales = state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        assert memory.QUANTIZED[kind](weight) == weight.numel() / 2 + scales
