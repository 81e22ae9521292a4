"""Adapters made when experts were layers, on models that hold them in one parameter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import peftrs
from peftrs import ConfigError, LoraConfig
from peftrs.bases import experts
from peftrs.compat.weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from tests.model.tiny import shake

pytestmark = [
    pytest.mark.skipif(
        int(transformers.__version__.partition(".")[0]) < 5, reason="experts are layers before transformers 5"
    ),
    pytest.mark.filterwarnings(
        "ignore::UserWarning:peft", "ignore::FutureWarning", "ignore::RuntimeWarning:peft"
    ),
]
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2,
}  # fmt: skip
CHECKOUT = Path(__file__).resolve().parents[2]
TOKENS = torch.arange(12).view(2, 6)


def qwen() -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=8, num_experts=3, head_dim=4, mlp_only_layers=[])
    return Qwen3MoeForCausalLM(config).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)).eval()


MODELS: dict[str, tuple[Callable[[], Any], str, list[str]]] = {
    "qwen": (qwen, "mlp", ["gate_proj", "up_proj", "down_proj"]),
    "mixtral": (mixtral, "block_sparse_moe", ["w1", "w3", "w2"]),
}
models = pytest.mark.parametrize("name", MODELS)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def older(name: str, folder: Path, *, rank: int = 2, **options: Any) -> dict[str, Tensor]:
    """The files of an adapter of the layers one by one, as libraries wrote them before."""
    _, block, layers = MODELS[name]
    inner = 12 if name == "mixtral" else 8
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    sizes = {f"{block}.experts.{at}.{one}": (8, inner) for at in range(3) for one in layers[:2]}
    sizes |= {f"{block}.experts.{at}.{layers[2]}": (inner, 8) for at in range(3)}
    sizes |= {f"{block}.gate": (8, 3), "self_attn.q_proj": (8, 8)}
    for number in range(2):
        for path, (wide, out) in sizes.items():
            module = f"base_model.model.model.layers.{number}.{path}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, wide, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "gate", *layers],
        **options,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


@models
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_an_older_adapter_gives_what_its_layers_gave(name: str, rslora: bool, tmp_path: Path) -> None:
    make, block, layers = MODELS[name]
    tensors = older(name, tmp_path / "older", use_rslora=rslora)
    ours = peftrs.PeftModel.from_pretrained(make(), tmp_path / "older")
    assert sorted([*ours.load_reports["default"].used, *ours.load_reports["default"].remapped]) == sorted(
        tensors
    )
    base, scaling = make(), 3 / 2**0.5 if rslora else 3 / 2
    with torch.no_grad():
        for number in range(2):
            inner = base.model.layers[number]

            def delta(path: str, number: int = number) -> Tensor:
                module = f"base_model.model.model.layers.{number}.{path}"
                return scaling * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]

            inner.self_attn.q_proj.weight += delta("self_attn.q_proj")
            inner.mlp.gate.weight += delta(f"{block}.gate")
            for at in range(3):
                parts = [delta(f"{block}.experts.{at}.{layer}") for layer in layers]
                inner.mlp.experts.gate_up_proj[at] += torch.cat(parts[:2])
                inner.mlp.experts.down_proj[at] += parts[2]
    close(logits(ours), logits(base))
    ours.merge_adapter()
    close(logits(ours), logits(base))


@models
def test_files_and_configs_are_those_that_peft_makes_of_them(name: str, tmp_path: Path) -> None:
    make, _, _ = MODELS[name]
    older(name, tmp_path / "older")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "older").eval()
    ours = peftrs.PeftModel.from_pretrained(make(), tmp_path / "older")
    close(logits(ours), logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / one / "adapter_model.safetensors") for one in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    configs = [json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("theirs", "ours")]
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        assert configs[0][field] == configs[1][field], field
    for field in ("target_modules", "target_parameters"):
        assert set(configs[0][field]) == set(configs[1][field]), field
    close(logits(peftrs.PeftModel.from_pretrained(make(), tmp_path / "theirs")), logits(theirs))
    close(logits(peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()), logits(theirs))


@models
def test_new_adapters_with_older_names_interchange(name: str, tmp_path: Path) -> None:
    make, _, layers = MODELS[name]
    ours = peftrs.get_peft_model(make(), LoraConfig(r=2, target_modules=["q_proj", *layers]))
    shake(ours)
    ours.save_pretrained(tmp_path)
    close(logits(peft.PeftModel.from_pretrained(make(), tmp_path).eval()), logits(ours))
    assert ours.peft_config["default"].rank_pattern == {r".*\.gate_up_proj": 4}


@models
def test_all_linear_layers_are_those_that_were(name: str) -> None:
    make, _, _ = MODELS[name]
    config, other = LoraConfig(target_modules="all-linear"), peft.LoraConfig(target_modules="all-linear")
    plan = peftrs.plan(make(), config)
    peftrs.get_peft_model(make(), config)
    peft.get_peft_model(make(), other)
    assert set(config.target_parameters or ()) == other.target_parameters
    assert {target.rpartition(".")[2] for target in config.target_modules or ()} == other.target_modules
    assert "model.layers.1.mlp.experts.gate_up_proj" in plan.targets


def test_patterns_choose_layers_and_ranks() -> None:
    options: dict[str, Any] = {
        "target_modules": r".*layers\.1\..*(gate_proj|up_proj)",
        "rank_pattern": {"up_proj": 2},
        "lora_alpha": 8,
    }
    with pytest.raises(ConfigError, match="different scalings"):
        peftrs.get_peft_model(qwen(), LoraConfig(**options))
    config = LoraConfig(**options, alpha_pattern={"up_proj": 2})
    model = peftrs.get_peft_model(qwen(), config)
    assert config.target_parameters == ["model.layers.1.mlp.experts.gate_up_proj"]
    key = r"^model\.layers\.1\.mlp\.experts\.gate_up_proj$"
    assert (config.rank_pattern[key], config.alpha_pattern[key]) == (10, 10)
    layer = model.base_model.model.model.layers[1].mlp.experts
    assert (layer.r["default"], layer.scaling["default"]) == (10, 1.0)


def test_half_of_a_parameter_is_refused() -> None:
    for targets in (["gate_proj"], r".*experts\.0\.(gate|up)_proj"):
        with pytest.raises(ConfigError, match=r"cannot be adapted alone: gate_proj, up_proj of all experts"):
            peftrs.get_peft_model(qwen(), LoraConfig(target_modules=targets))


def test_an_incomplete_file_is_told_by_its_own_names(tmp_path: Path) -> None:
    tensors = older("qwen", tmp_path / "older")
    lost = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_B.weight"
    save_file(
        {name: one for name, one in tensors.items() if name != lost},
        tmp_path / "older" / "adapter_model.safetensors",
    )
    with pytest.raises(
        peftrs.CheckpointError,
        match=r"missing: .*layers\.1\.mlp\.experts\.base_layer\.lora_B.*unexpected: .*experts\.0",
    ):
        peftrs.PeftModel.from_pretrained(qwen(), tmp_path / "older")


PROGRAM = """
import sys, torch
import peftrs.compat
peftrs.compat.install()
from tests.interchange.test_experts import MODELS, logits
model = MODELS[sys.argv[1]][0]()
model.load_adapter(sys.argv[2])
torch.save(logits(model), sys.argv[2] + "/logits.pt")
model.save_pretrained(sys.argv[2] + "/again")
again = MODELS[sys.argv[1]][0]()
again.load_adapter(sys.argv[2] + "/again")
torch.save(logits(again), sys.argv[2] + "/again.pt")
"""


@models
@pytest.mark.parametrize("some", [False, True], ids=["all", "gate-and-up"])
def test_transformers_loads_it_too_and_saves_what_it_made_of_it(
    name: str, some: bool, tmp_path: Path
) -> None:
    make, _, layers = MODELS[name]
    tensors = older(
        name, tmp_path / "older", **({"target_modules": ["q_proj", "gate", *layers[:2]]} if some else {})
    )
    if some:
        kept = {name: one for name, one in tensors.items() if f".{layers[2]}." not in name}
        save_file(kept, tmp_path / "older" / "adapter_model.safetensors")
    expected = logits(peftrs.PeftModel.from_pretrained(make(), tmp_path / "older"))
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM, name, str(tmp_path / "older")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    close(torch.load(tmp_path / "older" / "logits.pt"), expected)
    assert torch.equal(
        torch.load(tmp_path / "older" / "again.pt"), torch.load(tmp_path / "older" / "logits.pt")
    )


@models
def test_the_conversions_by_themselves_give_what_theirs_give(name: str, tmp_path: Path) -> None:
    make, _, _ = MODELS[name]
    tensors = older(name, tmp_path / "older")
    config = peftrs.PeftConfig.from_pretrained(tmp_path / "older")
    convert_peft_config_for_transformers(config, make(), None)
    assert set(config.target_parameters) == {"gate_up_proj", "down_proj", "gate.weight"}
    ours = convert_peft_adapter_state_dict_for_transformers(
        peftrs.get_peft_model(make(), config), config, tensors
    )
    other = peft.PeftConfig.from_pretrained(tmp_path / "older")
    theirs = import_module(
        "peft.utils.transformers_weight_conversion"
    ).convert_peft_adapter_state_dict_for_transformers(peft.get_peft_model(make(), other), other, tensors)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    plain = peftrs.get_peft_model(make(), LoraConfig(target_modules=["q_proj"]))
    state = peftrs.get_peft_model_state_dict(plain)
    same = convert_peft_adapter_state_dict_for_transformers(plain, plain.peft_config["default"], state)
    assert same.keys() == state.keys()


def test_whatever_transformers_brings_together_stands_in_modules_called_experts() -> None:
    conversions = import_module("transformers.conversion_mapping")._build_checkpoint_conversion_mapping()
    found = {fusion.holder for kind in conversions for fusion in experts._experts(kind).fusions}
    assert found
    assert all(experts.HOLDERS in holder for holder in found)
