"""`peftrs verify` on what other libraries make of the same adapter: right where they are right, and named
where they are not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from peftrs._native import tool_main
from peftrs.cli import _by_class, _extract
from tests.cli.test_tool import mixtral
from tests.model import tiny

Model = Any

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Setting `save_embedding_layers`")


def verify(capfd: pytest.CaptureFixture[str], folder: Path, merged: str = "merged") -> Any:
    capfd.readouterr()
    arguments = ["verify", folder / "base", folder / "adapter", folder / merged, "--json"]
    code = tool_main([os.fspath(argument) for argument in arguments], _by_class, _extract)
    report = json.loads(capfd.readouterr().out)
    assert report["right"] is (code == 0)
    return report


def gpt2() -> Model:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    )


CASES: dict[str, tuple[Callable[[], Model], dict[str, Any]]] = {
    "llama": (tiny.llama, {"target_modules": "all-linear"}),
    "llama-tied": (
        lambda: tiny.llama(tied=True),
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 2},
    ),
    "llama-rslora": (
        tiny.llama,
        {"target_modules": ["v_proj"], "use_rslora": True, "rank_pattern": {"1.self_attn.v_proj": 3}},
    ),
    "llama-dora": (tiny.llama, {"target_modules": ["v_proj"], "use_dora": True}),
    "llama-embedding": (tiny.llama, {"target_modules": ["embed_tokens"]}),
    "llama-head": (tiny.llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "llama-tokens": (
        lambda: tiny.llama(tied=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ),
    "bert": (tiny.bert, {"target_modules": ["query", "dense"]}),
    "bert-ia3": (
        tiny.bert,
        {"method": peft.IA3Config, "target_modules": ["key", "dense"], "feedforward_modules": ["dense"]},
    ),
    "bert-oft": (
        tiny.bert,
        {"method": peft.OFTConfig, "target_modules": ["query", "key"], "oft_block_size": 8},
    ),
    "gpt2": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}

if int(transformers.__version__.partition(".")[0]) >= 5:
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    CASES["mixtral"] = (mixtral, {"target_modules": ["q_proj"], "target_parameters": experts})


def merged_by_peft(
    folder: Path, case: str, dtype: torch.dtype, adapter_dtype: torch.dtype = torch.float32
) -> Model:
    """Saves a base, an adapter that PEFT made for it, and PEFT's merge of the two."""
    make, options = CASES[case]
    method = options.get("method", peft.LoraConfig)
    config = method(**{name: value for name, value in options.items() if name != "method"})
    make().to(dtype).save_pretrained(folder / "base")
    model = peft.get_peft_model(make().to(dtype), config, autocast_adapter_dtype=False)
    tiny.shake(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    model.save_pretrained(folder / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_what_peft_merged_is_right(
    case: str, dtype: torch.dtype, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    merged_by_peft(tmp_path, case, dtype)
    report = verify(capfd, tmp_path)
    assert report["faults"] == []


def test_an_adapter_in_half_precision_is_right(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    merged_by_peft(tmp_path, "llama", torch.bfloat16, torch.bfloat16)
    assert verify(capfd, tmp_path)["faults"] == []


def test_saving_again_otherwise_is_right(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    merged_by_peft(tmp_path, "llama-tied", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert verify(capfd, tmp_path, "again")["faults"] == []


def test_the_bare_model_inside_is_told_apart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    merged = merged_by_peft(tmp_path, "llama", torch.float32)
    merged.model.save_pretrained(tmp_path / "inside")
    assert verify(capfd, tmp_path, "inside")["faults"] == ["1 tensors are missing: lm_head.weight"]


def test_a_merge_that_never_happened_and_one_too_many(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    merged_by_peft(tmp_path, "llama", torch.bfloat16)
    (fault,) = verify(capfd, tmp_path, "base")["faults"]
    assert fault.startswith("not merged at all")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    twice = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    twice.save_pretrained(tmp_path / "twice")
    (fault,) = verify(capfd, tmp_path, "twice")["faults"]
    assert fault.startswith("merged twice: all 14 tensors")
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", tmp_path / "merged")
    (fault,) = verify(capfd, tmp_path)["faults"]
    assert fault.startswith("adapter_config.json lies beside")
