"""Embeddings and heads, tied or not, trained in every way, with more tokens or none: the merged folder is the
adapted model.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peftrs
from peftrs import _native
from tests.model.tiny import llama, logits, shake

EMBED, HEAD = ["embed_tokens"], ["lm_head"]
PARTS = {"embed": EMBED, "head": HEAD, "both": [*EMBED, *HEAD]}
# Rows of a head are trained with those of the embedding that it is tied to.
CASES = [
    (part, way) for part in PARTS for way in ("lora", "saved", "tokens") if way != "tokens" or part == "embed"
]
TOKENS = torch.tensor([[1, 5, 63, 7, 2, 30]])


def settings(way: str, parts: list[str]) -> dict[str, Any]:
    if way == "lora":
        return {"target_modules": ["q_proj", *parts]}
    if way == "saved":
        return {"target_modules": ["q_proj"], "modules_to_save": parts}
    return {"target_modules": ["q_proj"], "trainable_token_indices": {part: [5, 63] for part in parts}}


@pytest.mark.parametrize("more", [0, 7, 64], ids=["as many", "more", "padded"])
@pytest.mark.parametrize(("part", "way"), CASES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_merged_folder_is_the_adapted_model(
    tied: bool, part: str, way: str, more: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    llama(tied=tied).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if more:
        base.resize_token_embeddings(64 + more, mean_resizing=False)
        base.save_pretrained(tmp_path / "grown")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights that were tied: what comes of them is checked here
        adapted = peftrs.get_peft_model(
            base, peftrs.LoraConfig(r=2, task_type="CAUSAL_LM", **settings(way, PARTS[part]))
        )
        shake(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
    arguments = [
        str(tmp_path / "base"),
        str(tmp_path / "adapter"),
        "-o",
        str(tmp_path / "out"),
        "--quiet",
        "--no-sync",
    ]
    if more and way == "lora" and not tied and part != "both":
        # As PEFT saves it: one table of two that are longer than the base's.
        shutil.copytree(tmp_path / "adapter", tmp_path / "peft")
        other = "lm_head" if part == "embed" else "embed_tokens"
        held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        left = {key: value for key, value in held.items() if other not in key}
        assert len(left) == len(held) - 1
        save_file(left, tmp_path / "peft" / "adapter_model.safetensors")
        given = [arguments[0], str(tmp_path / "peft"), *arguments[2:]]
        assert _native.merge_main(given) == 1
        assert (
            "hint: the adapter holds one of the two: merge into the base as it was resized"
            in capfd.readouterr().err
        )
        assert (
            _native.merge_main(
                [str(tmp_path / "grown"), given[1], "-o", str(tmp_path / "in grown"), "--no-sync"]
            )
            == 0
        )
    assert _native.merge_main(arguments) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == 64 + more
    assert merged.config.tie_word_embeddings is (
        merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    )
    expected = logits(adapted, TOKENS)
    assert (expected - logits(llama(tied=tied), TOKENS)[..., :1]).abs().max() > 1e-3
    torch.testing.assert_close(logits(merged, TOKENS), expected, rtol=1e-5, atol=1e-5)
