"""Experts that transformers keeps in one parameter and its checkpoints one by one: the merged folder is the
adapted model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import peftrs
from peftrs import _native
from tests.model.tiny import logits, shake

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def qwen() -> Any:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4, head_dim=8))


@pytest.mark.parametrize(
    ("make", "stored"),
    [(mixtral, "block_sparse_moe.experts.3.w1"), (qwen, "mlp.experts.3.gate_proj")],
    ids=["mixtral", "qwen3-moe"],
)
def test_a_merged_folder_gives_the_adapters_outputs(
    make: Callable[[], Any], stored: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        assert f"model.layers.0.{stored}.weight" in file.keys()  # noqa: SIM118
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    if not any(name.endswith("experts.gate_up_proj") for name, _ in base.named_parameters()):
        pytest.skip("this transformers keeps a module for each expert")
    plain = logits(base)
    config = peftrs.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    adapted = peftrs.get_peft_model(base, config)
    shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    code = _native.merge_main(
        [str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--quiet"]
    )
    assert code == 0
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (merged - plain).norm() > 0.05 * plain.norm()
    torch.testing.assert_close(merged, logits(adapted), rtol=1e-5, atol=1e-5)
