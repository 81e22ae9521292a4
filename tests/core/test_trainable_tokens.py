"""Rows of embeddings trained alone: files and outputs are PEFT's both ways, and what is tied stays tied."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import peftrs
from tests.model.tiny import TOKENS, llama, shake

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning:peft", "ignore:the input and output embeddings"
)
ROWS = sorted({int(token) for token in TOKENS[0]})


def t5() -> Any:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0
        )
    ).eval()


BASES = {"untied": llama, "tied": lambda: llama(tied=True), "encoder-decoder": t5}


def output(model: Any) -> Tensor:
    more = {"decoder_input_ids": TOKENS} if hasattr(model.get_base_model(), "decoder") else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **more).logits


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_files_interchange_both_ways(base: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(BASES[base](), peft.TrainableTokensConfig(token_indices=ROWS))
    plain = output(theirs)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peftrs.PeftModel.from_pretrained(BASES[base](), tmp_path / "theirs")
    close(output(ours), output(theirs))
    assert not torch.allclose(output(ours), plain)
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    close(output(peft.PeftModel.from_pretrained(BASES[base](), tmp_path / "ours").eval()), output(theirs))
    merged = ours.merge_and_unload()
    with torch.no_grad():
        more = {"decoder_input_ids": TOKENS} if base == "encoder-decoder" else {}
        close(merged(input_ids=TOKENS, **more).logits, output(theirs))


def test_only_the_rows_are_trained_and_a_fresh_adapter_changes_nothing() -> None:
    plain = llama()(TOKENS).logits
    model = peftrs.get_peft_model(llama(), peftrs.TrainableTokensConfig(token_indices=ROWS))
    assert torch.equal(output(model), plain)
    assert model.peft_config["default"].target_modules == {"embed_tokens"}
    trained = {name: tuple(one.shape) for name, one in model.named_parameters() if one.requires_grad}
    assert list(trained.values()) == [(len(ROWS), 32)]
    assert isinstance(model.base_model, peftrs.TrainableTokensModel)
    random = peftrs.get_peft_model(
        llama(), peftrs.TrainableTokensConfig(token_indices=ROWS, init_weights=False)
    )
    assert not torch.allclose(output(random), plain)


def test_tokens_that_no_table_has_are_refused() -> None:
    with pytest.raises(peftrs.ConfigError, match=r"`token_indices`: \[64\] lie outside"):
        peftrs.get_peft_model(llama(), peftrs.TrainableTokensConfig(token_indices=[1, 64]))


def test_rows_of_a_head_of_its_own(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"lm_head": [2, 5], "embed_tokens": ROWS},
    }
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**arguments)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = peftrs.PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    close(output(ours), output(theirs))
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    close(output(peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()), output(theirs))


@pytest.mark.parametrize("names", [("embed_tokens", "lm_head"), ("lm_head", "embed_tokens")])
def test_what_is_tied_and_named_too_shares_its_rows(names: tuple[str, str]) -> None:
    same = {name: [2, 5] for name in names}
    for config in (
        peftrs.LoraConfig(target_modules=["q_proj"], trainable_token_indices=same),
        peftrs.TrainableTokensConfig(target_modules=list(names), token_indices=[2, 5]),
    ):
        model = peftrs.get_peft_model(llama(tied=True), config)
        assert sum("trainable_tokens_delta" in name for name, _ in model.named_parameters()) == 1
        shake(model)
        base = model.get_base_model()
        assert torch.equal(base.model.embed_tokens.folded().weight.mT, base.lm_head.folded().weight)


def test_what_is_tied_and_named_with_other_tokens_has_rows_of_its_own() -> None:
    arguments: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"lm_head": [2, 5], "embed_tokens": [5, 7]},
    }
    model = peftrs.get_peft_model(llama(tied=True), peftrs.LoraConfig(**arguments))
    held = {
        name: tuple(one.shape) for name, one in model.named_parameters() if "trainable_tokens_delta" in name
    }
    assert len(held) == 2
    with pytest.raises(peftrs.ConfigError, match=r"are tied .* rows of their own, \[5, 7\] and \[2, 5\]"):
        peftrs.get_peft_model(llama(tied=True), peftrs.LoraConfig(**arguments, ensure_weight_tying=True))
    with pytest.raises(
        peftrs.ConfigError, match=r"model\.norm is a LlamaRMSNorm, neither embedding nor linear"
    ):
        peftrs.get_peft_model(
            llama(), peftrs.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"norm": [1]})
        )


def warned(base: Any, **arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peftrs.get_peft_model(base, peftrs.LoraConfig(**{"target_modules": ["q_proj"], **arguments}))
    return [str(one.message) for one in caught]


def test_ties_that_an_adapter_would_cut_are_told() -> None:
    (text,) = warned(llama(tied=True), modules_to_save=["lm_head"])
    assert "lm_head is trained whole, and parts from 'model.embed_tokens'" in text
    assert not warned(llama(tied=True), modules_to_save=["lm_head"], ensure_weight_tying=True)
    assert not warned(llama(tied=True), modules_to_save=["lm_head", "embed_tokens"])
    assert not warned(llama(), modules_to_save=["lm_head"])
    assert not warned(llama(tied=True), target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    assert not warned(llama(tied=True), trainable_token_indices=[3], ensure_weight_tying=True)
    for arguments in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}, {}):
        (text,) = warned(llama(), **arguments, ensure_weight_tying=True)
        assert "`ensure_weight_tying` has no effect" in text
