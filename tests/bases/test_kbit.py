"""Models that transformers loads quantized: preparing them, checkpointing, merging them into 16 bits."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from peftrs import (
    AdaptionPromptConfig,
    ConfigError,
    LoraConfig,
    MergeError,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peftrs.model.kbit import _checkpointing
from tests.bases.models import LAYERS, TOKENS, load, write

for needed in ("bitsandbytes", "hqq", "torchao"):
    pytest.importorskip(needed)

KINDS = ("nf4", "int8", "hqq", "torchao")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unquantized model."""
    made = tmp_path_factory.mktemp("llama")
    write(made)
    return made


def quantized(folder: Path, kind: str | None, dtype: torch.dtype = torch.float32) -> Any:
    """The model, whatever its library warns of while it loads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(folder, kind, dtype)


def config(**options: Any) -> LoraConfig:
    """A LoRA over every linear layer."""
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_preparing_is_as_in_peft(folder: Path, kind: str | None) -> None:
    import peft

    found = []
    for prepare in (prepare_model_for_kbit_training, peft.prepare_model_for_kbit_training):
        model = quantized(folder, kind, torch.bfloat16)
        assert prepare(model, use_gradient_checkpointing=False) is model
        found.append({name: (one.dtype, one.requires_grad) for name, one in model.named_parameters()})
    assert found[0] == found[1]
    assert not any(requires_grad for _, requires_grad in found[0].values())


@pytest.mark.parametrize("reentrant", [True, False, None])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients_without_further_calls(
    folder: Path, kind: str, reentrant: bool | None
) -> None:
    found = []
    for checkpointing in (False, True):
        model = quantized(folder, kind)
        options = None if reentrant is None else {"use_reentrant": reentrant}
        prepare_model_for_kbit_training(model, checkpointing, options if checkpointing else None)
        torch.manual_seed(0)
        peft = get_peft_model(model, config(init_lora_weights=False)).train()
        assert any(getattr(one, "gradient_checkpointing", False) for one in model.modules()) is checkpointing
        peft(input_ids=TOKENS, labels=TOKENS).loss.backward()
        found.append({name: one.grad for name, one in peft.named_parameters() if one.requires_grad})
    assert len(found[0]) == 7 * 2 * LAYERS
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("after", [True, False])
def test_checkpointing_turned_on_before_or_after_gives_gradients(folder: Path, after: bool) -> None:
    model = quantized(folder, "nf4")
    if after and not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("this version of transformers does not ask the embeddings for gradients")
    for reentrant in (True, False):
        other = copy.deepcopy(model)
        if not after:
            _checkpointing(other)({"use_reentrant": reentrant})
        peft: Any = get_peft_model(other, config()).train()
        if after:
            _checkpointing(peft.get_base_model())({"use_reentrant": reentrant})
        peft(input_ids=TOKENS, labels=TOKENS).loss.backward()
        assert all(one.grad is not None for one in peft.parameters() if one.requires_grad)


def test_a_model_that_cannot_checkpoint_is_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64).to("cpu"))
    with pytest.raises(ConfigError, match="use_gradient_checkpointing=False"):
        prepare_model_for_kbit_training(model)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_one_of_16_bits(folder: Path, kind: str, tmp_path: Path) -> None:
    model = quantized(folder, kind)
    peft = get_peft_model(
        model, config(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).train()
    with torch.no_grad():
        # Not in eval mode, in which bitsandbytes packs layers that are not adapted for some CPUs, and rounds
        # their scales.
        expected = peft(input_ids=TOKENS).logits
    merged: Any = peft.merge_and_unload(dtype=torch.float32)
    linear = [one for one in merged.modules() if isinstance(one, nn.Linear) or "Linear" in type(one).__name__]
    assert {type(one) for one in linear} == {nn.Linear}
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        logits = merged(input_ids=TOKENS).logits
    near = 1e-4
    torch.testing.assert_close(logits, expected, rtol=near, atol=near)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=TOKENS).logits, logits)


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "as loaded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_a_model_merged_in_a_dtype_runs_in_it(
    folder: Path, kind: str | None, dtype: torch.dtype, prepared: bool, tmp_path: Path
) -> None:
    model = quantized(folder, kind, dtype)
    if prepared:
        prepare_model_for_kbit_training(model)
    peft = get_peft_model(model, config(init_lora_weights=False))
    with torch.no_grad():
        expected = peft(input_ids=TOKENS).logits.float()
    merged: Any = peft.merge_and_unload(dtype=torch.bfloat16)
    plain = quantized(folder, None, torch.bfloat16)
    assert {name: one.dtype for name, one in (*merged.named_parameters(), *merged.named_buffers())} == {
        name: one.dtype for name, one in (*plain.named_parameters(), *plain.named_buffers())
    }
    assert merged.dtype is torch.bfloat16
    assert merged.config.to_dict() == plain.config.to_dict() | {"_name_or_path": merged.config._name_or_path}
    with torch.no_grad():
        logits = merged(input_ids=TOKENS).logits
    assert logits.dtype is torch.bfloat16
    assert float((logits.float() - expected).norm() / expected.norm()) < 0.03
    asked = {
        "attention_mask": torch.ones_like(TOKENS),
        "max_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
    }
    written = merged.generate(TOKENS, **asked)
    merged.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="auto")
    assert {one.dtype for one in again.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS).logits, logits)
    assert torch.equal(again.generate(TOKENS, **asked), written)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_saving_and_loading_over_a_quantized_base(folder: Path, tmp_path: Path) -> None:
    import peft as other

    model = quantized(folder, "nf4")
    peft = get_peft_model(model, config(init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = peft(input_ids=TOKENS).logits
    peft.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(folder, "nf4"), tmp_path).eval()
    theirs = other.PeftModel.from_pretrained(quantized(folder, "nf4"), tmp_path).train()
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS).logits, expected)
        # In eval mode the library's packing for some CPUs would round PEFT's scales.
        torch.testing.assert_close(theirs(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_quantized_module_is_not_trained_whole(folder: Path) -> None:
    model = quantized(folder, "nf4")
    with pytest.raises(ConfigError, match="quantized, which cannot be trained whole"):
        get_peft_model(model, config(target_modules=["q_proj"], modules_to_save=["o_proj"]))


@pytest.mark.parametrize("kind", ["nf4", "hqq"])
def test_adaption_prompts_see_the_width_of_quantized_attention(folder: Path, kind: str) -> None:
    prompts = AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    peft = get_peft_model(quantized(folder, kind), prompts)
    peft(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {name: one for name, one in peft.named_parameters() if one.requires_grad}
    assert {tuple(one.shape) for one in trained.values()} == {(1, 3, 64), (1,)}
    assert {one.dtype for one in trained.values()} == {torch.float32}


def test_a_refused_merge_leaves_everything(folder: Path) -> None:
    model = quantized(folder, "nf4")
    peft = get_peft_model(model, config()).eval()
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-5 * torch.randn_like(parameter))
        expected = peft(input_ids=TOKENS).logits
        with pytest.raises(MergeError, match="rounds the update away"):
            peft.merge_and_unload()
        assert torch.equal(peft(input_ids=TOKENS).logits, expected)
