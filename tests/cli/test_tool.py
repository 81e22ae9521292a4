"""`peftrs` as the wheel has it: what it says of models and adapters is what Python does with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from peftrs import IA3Config, LoraConfig, PeftModel, get_peft_model
from peftrs._native import tool_main
from peftrs.cli import _by_class, _extract
from peftrs.core.layer import AdaptedLayer
from peftrs.core.tree import wrappers
from tests.model import tiny

SIZES: dict[str, int] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    )


def t5() -> Any:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def vit() -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, image_size=16, patch_size=8)
    )


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, vocab_size=64, num_key_value_heads=2, num_local_experts=3)
    return transformers.MixtralForCausalLM(config)


CASES = {
    "llama-names": (tiny.llama, {"target_modules": ["q_proj", "down_proj"]}),
    "llama-pattern": (tiny.llama, {"target_modules": r".*layers\.1\..*_proj", "exclude_modules": ["k_proj"]}),
    "llama-layers": (
        tiny.llama,
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "rank_pattern": {"v_proj": 3}},
    ),
    "llama-all": (tiny.llama, {"target_modules": "all-linear"}),
    "llama-embedding": (tiny.llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "bert-all": (tiny.bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "bert-headless": (tiny.bert, {"target_modules": ["query", "dense"], "modules_to_save": ["pooler"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-all": (gpt2, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "t5": (t5, {"target_modules": ["q", "wo"]}),
    "t5-all": (t5, {"target_modules": "all-linear"}),
    "vit": (vit, {"target_modules": r".*\.(projection|query|q_proj)"}),
}
if int(transformers.__version__.partition(".")[0]) >= 5:
    CASES["mixtral"] = (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    )

RENAMED = {"vit", "mixtral"}
"""Models whose layers transformers 5 names otherwise than their files do."""


BOTH = [(case, by_class) for case in CASES for by_class in (True, False) if by_class or case not in RENAMED]


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capfd.readouterr()
    code = tool_main([os.fspath(argument) for argument in arguments], _by_class, _extract)
    streams = capfd.readouterr()
    return code, streams.out, streams.err


def report(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    code, out, err = run(capfd, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize(("case", "by_class"), BOTH)
def test_what_targets_says_is_what_injection_does(
    case: str, by_class: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, options = CASES[case]
    model = make()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=8, **options)
    config.save_pretrained(tmp_path)
    more = ["--by-class"] if by_class else []
    found = report(capfd, "targets", tmp_path / "base", "--config", tmp_path, *more)["config"]
    adapted = get_peft_model(model, config)
    layers = [layer for _, layer in wrappers(adapted.base_model.model) if isinstance(layer, AdaptedLayer)]
    names = {
        name.replace(".base_layer", "")
        for name, layer in wrappers(adapted.base_model.model)
        if layer in layers
    }
    owners = {name.rpartition(".")[0] for name in found["parameters"]}
    assert names == set(found["targets"]) | owners
    trained = sum(one.numel() for name, one in adapted.named_parameters() if "lora_" in name)
    assert found["added"] == trained


def test_a_model_that_transformers_does_not_know_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.llama().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nobody", "architectures": ["Nobody"]}')
    code, out, err = run(capfd, "targets", tmp_path, "--by-class")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path}: transformers cannot build the model: ")
    assert err.splitlines()[-1] == "hint: name the layers instead of asking the class"


@torch.no_grad()
def test_norms_are_torchs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "embed_tokens"],
        rank_pattern={"layers.1.self_attn.q_proj": 6},
    )
    model = get_peft_model(tiny.llama(), config)
    tiny.shake(model)
    model.save_pretrained(tmp_path)
    rows = {row["module"]: row for row in report(capfd, "inspect", tmp_path, "--norms")["norms"]["updates"]}
    layers = {
        name: layer for name, layer in wrappers(model.base_model.model) if isinstance(layer, AdaptedLayer)
    }
    assert set(rows) == set(layers)
    for name, row in rows.items():
        dense = layers[name].get_delta_weight("default").double()
        values = torch.linalg.svdvals(dense)
        shares = (values / values.sum()).clamp_min(1e-300)
        effective = torch.exp(-(shares * shares.log()).sum())
        expected = [float(dense.norm()), float(values[0]), float(effective)]
        # The dense update is torch's, in float32.
        assert [row["update"], row["largest_singular_value"], row["effective_rank"]] == pytest.approx(
            expected, rel=1e-5
        )


@torch.no_grad()
def test_the_cosine_of_two_updates_is_torchs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models: list[PeftModel] = []
    for seed, rank in [(1, 4), (2, 3)]:
        model = get_peft_model(tiny.llama(), LoraConfig(r=rank, target_modules=["q_proj"]))
        tiny.shake(model, seed)
        model.save_pretrained(tmp_path / str(seed))
        models.append(model)
    found = report(capfd, "diff", tmp_path / "1", tmp_path / "2")
    for row in found["rows"]:
        one, other = [
            model.base_model.model.get_submodule(row["name"]).get_delta_weight("default").double()
            for model in models
        ]
        cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert [row["left"], row["right"], row["distance"]] == pytest.approx(
            [float(one.norm()), float(other.norm()), float((one - other).norm())], rel=1e-5
        )
        assert row["up_distance"] is None, "the ranks differ"
        assert row["cosine"] == pytest.approx(float(cosine), abs=1e-6)
    assert len(found["rows"]) == 2


def test_every_method_can_be_inspected(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    get_peft_model(
        tiny.llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ).save_pretrained(tmp_path)
    found = report(capfd, "inspect", tmp_path, "--norms")
    assert (found["method"], found["modules"], found["leaves"][0]["name"]) == ("IA3", 2, "k_proj")
    assert len(found["norms"]["tensors"]) == 2


def test_the_console_script_needs_no_torch(tmp_path: Path) -> None:
    get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    program = "import sys; sys.modules['torch'] = None; from peftrs.cli import tool; sys.exit(tool())"
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run([*command, "inspect", tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path}: adapter, LORA\n")
    tiny.llama().save_pretrained(tmp_path / "base")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "target_modules": "all-linear"}'
    )
    arguments = ["targets", tmp_path / "base", "--config", tmp_path / "all"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("hint: pip install peftrs[transformers]\n")
