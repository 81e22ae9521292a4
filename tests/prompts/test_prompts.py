"""What holds of every prompt: it stands before the text in every call, one acts at a time, and it goes as it
came.
"""

from __future__ import annotations

import copy
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import peftrs
from peftrs import AdapterError, CheckpointError, ConfigError, LoraConfig, MergeError, PeftrsWarning
from tests.prompts.cases import CASES, LEFT, MODELS, TOKENS, Case

KINDS = {
    "tokens": peftrs.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "network": peftrs.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "cache": peftrs.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "context": peftrs.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5]),
}
kinds = pytest.mark.parametrize("kind", KINDS)
models = pytest.mark.parametrize("name", ["llama", "gpt2"])


def prompted(kind: str = "tokens", name: str = "llama", seed: int = 4) -> Any:
    torch.manual_seed(seed)
    return peftrs.get_peft_model(MODELS[name](), copy.deepcopy(KINDS[kind])).eval()


def logits(model: Any, **options: Any) -> Tensor:
    inputs = {"input_ids": TOKENS} | options
    with torch.no_grad():
        return model(**inputs).logits[:, -inputs["input_ids"].shape[1] :]


def checkpoint(model: Any) -> None:
    """Turns on gradient checkpointing, by the name that this version of transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@kinds
@models
def test_padding_on_the_left_changes_nothing(kind: str, name: str) -> None:
    model = prompted(kind, name)
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)
    padded = logits(model, attention_mask=LEFT, position_ids=positions)
    texts = model.generate(input_ids=TOKENS, attention_mask=LEFT, max_new_tokens=5, min_new_tokens=5)
    for row, mask in enumerate(LEFT):
        alone = TOKENS[row : row + 1, mask == 1]
        close(padded[row, mask == 1], logits(model, input_ids=alone)[0])
        text = model.generate(
            input_ids=alone, attention_mask=torch.ones_like(alone), max_new_tokens=5, min_new_tokens=5
        )
        assert torch.equal(text[0, alone.shape[1] :], texts[row, TOKENS.shape[1] :])


@kinds
@models
def test_a_text_read_in_parts_reads_the_same(kind: str, name: str) -> None:
    model = prompted(kind, name)
    whole = logits(model)
    with torch.no_grad():
        first = model(input_ids=TOKENS[:, :4], use_cache=True)
        mask = torch.ones_like(TOKENS)
        rest = model(input_ids=TOKENS[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
    close(rest.logits, whole[:, 4:])
    several = model.generate(input_ids=TOKENS, max_new_tokens=5, min_new_tokens=5, use_cache=False)
    assert torch.equal(several, model.generate(input_ids=TOKENS, max_new_tokens=5, min_new_tokens=5))


@kinds
def test_one_prompt_acts_at_a_time(kind: str) -> None:
    model = prompted(kind)
    base = logits(MODELS["llama"]())
    first = logits(model)
    other = {"tokens": "cache", "network": "tokens", "cache": "network", "context": "cache"}[kind]
    model.add_adapter("other", copy.deepcopy(KINDS[other]))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, base)
    assert not any(parameter.requires_grad for parameter in model.prompt_encoder["default"].parameters())
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        generated = model.generate(input_ids=TOKENS, max_new_tokens=3)
    assert torch.equal(generated, MODELS["llama"]().generate(input_ids=TOKENS, max_new_tokens=3))
    with pytest.raises(AdapterError, match="only one of them"):
        model.set_adapter(["default", "other"])
    assert torch.equal(logits(model), second)
    with pytest.warns(PeftrsWarning, match="'default' is active now"):
        model.delete_adapter("other")
    assert torch.equal(logits(model), first)


def test_a_prompt_acts_beside_a_change_of_layers() -> None:
    model = prompted("cache")
    alone = logits(model)
    model.add_adapter("lora", LoraConfig(init_lora_weights=False, target_modules="all-linear"))
    assert set(model.prompt_encoder) == {"default"}
    assert torch.equal(logits(model), alone)
    model.set_adapter(["default", "lora"])
    both = logits(model)
    with pytest.raises(MergeError, match="is a prompt"):
        model.merge_adapter()
    model.merge_adapter(["lora"])
    close(logits(model), both)
    model.unmerge_adapter()
    model.set_adapter("lora")
    changed = logits(model)
    assert not torch.allclose(changed, both)
    model.delete_adapter("default")
    assert torch.equal(logits(model), changed)


@kinds
def test_a_prompt_comes_off_without_a_trace(kind: str) -> None:
    base = MODELS["llama"]()
    names = list(base.state_dict())
    model = peftrs.get_peft_model(base, copy.deepcopy(KINDS[kind]))
    with pytest.raises(MergeError, match="is a prompt"):
        model.merge_and_unload()
    assert model.unload() is base
    assert list(base.state_dict()) == names
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())
    assert torch.equal(logits(base), logits(MODELS["llama"]()))


@kinds
def test_copies_are_their_own(kind: str) -> None:
    model = prompted(kind)
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    expected = logits(model.eval())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other), expected)
        with torch.no_grad():
            for parameter in other.prompt_encoder.parameters():
                parameter.zero_()
        assert not torch.allclose(logits(other), expected)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["tokens", "network"])
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = prompted(kind).train()
        if checkpointing:
            checkpoint(model)
            model.prepare_model_for_gradient_checkpointing(model.get_base_model())
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        assert all(gradient.abs().max() > 0 for gradient in gradients[-1])
    for one, other in zip(*gradients, strict=True):
        close(one, other)


def test_checkpointing_that_drops_keys_and_values_is_refused() -> None:
    model = prompted("cache")
    checkpoint(model)
    logits(model)
    with pytest.raises(AdapterError, match="gradient checkpointing"):
        model.train()(input_ids=TOKENS)


@kinds
def test_the_state_is_saved_whoever_gathers_it(kind: str) -> None:
    model = prompted(kind)
    own = peftrs.get_peft_model_state_dict(model)
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = peftrs.get_peft_model_state_dict(model, gathered)
    assert own.keys() == given.keys() == {"prompt_embeddings"}
    assert torch.equal(own["prompt_embeddings"], given["prompt_embeddings"])
    other = prompted(kind, seed=8)
    other.set_requires_grad("default", False)
    assert peftrs.set_peft_model_state_dict(other, own) == ([], [])
    close(logits(other), logits(model))
    assert torch.equal(model.get_prompt_embedding_to_save("default"), own["prompt_embeddings"])


@kinds
def test_what_is_trained_and_shown(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = prompted(kind)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("prompt_encoder.default." in name for name in trained)
    model.print_trainable_parameters()
    assert (
        f"trainable params: {sum(model.get_parameter(name).numel() for name in trained):,d}"
        in capsys.readouterr().out
    )
    prompt = model.get_prompt(2)
    count = model.peft_config["default"].num_virtual_tokens
    if kind == "cache":
        assert prompt.get_seq_length() == count
    else:
        assert prompt.shape == (2, count, 16)
    assert len(model.prompt_tokens["default"]) == count
    assert model.word_embeddings is model.get_base_model().get_input_embeddings()
    assert model.active_peft_config.is_prompt_learning
    assert model.get_model_status().peft_types == {"default": model.peft_type.value}


@kinds
def test_training_goes_on_from_a_file(kind: str, tmp_path: Path) -> None:
    model = prompted(kind)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = peftrs.PeftModel.from_pretrained(MODELS["llama"](), tmp_path, is_trainable=True)
    assert [str(one.message) for one in caught if "network" in str(one.message)] == (
        ["files hold a prompt without the network that made it: training goes on with the prompt itself"]
        if kind == "network"
        else []
    )
    close(logits(again), logits(model))
    again(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert any(
        parameter.grad is not None and parameter.grad.abs().max() > 0
        for parameter in again.prompt_encoder.parameters()
    )


# Configs and files that nobody should trust.


def test_loading_opens_nothing_that_a_config_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def opened(*names: Any, **options: Any) -> None:
        raise AssertionError(names)

    model = prompted()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    hostile = {
        "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "attacker/x",
        "tokenizer_kwargs": {"trust_remote_code": True}, "inference_mode": False,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | hostile))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", opened)
    for trainable in (False, True):
        with pytest.warns(PeftrsWarning, match="never used to open"):
            loaded = peftrs.PeftModel.from_pretrained(MODELS["llama"](), tmp_path, is_trainable=trainable)
        assert torch.equal(logits(loaded), logits(model))


def test_sizes_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    model = prompted("cache", "gpt2")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    base = MODELS["gpt2"]()
    for field, value, error, message in (
        ("num_virtual_tokens", 10**9, ConfigError, "num_virtual_tokens"),
        ("num_virtual_tokens", True, ConfigError, "num_virtual_tokens"),
        ("num_virtual_tokens", 65_536, CheckpointError, "has shape"),
        ("num_layers", 16_000, CheckpointError, "has shape"),
        ("num_attention_heads", 7, ConfigError, "heads"),
        ("token_dim", 65_534, CheckpointError, "has shape"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(error, match=message):
            peftrs.PeftModel.from_pretrained(base, tmp_path)
        assert "prompt_encoder" not in base._modules
        assert not base._forward_pre_hooks


def test_a_file_without_the_prompt_is_refused_even_leniently(tmp_path: Path) -> None:
    prompted().save_pretrained(tmp_path)
    save_file({"other": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    for strict in (True, False):
        base = MODELS["llama"]()
        with pytest.raises(CheckpointError, match="prompt_embeddings is missing"):
            peftrs.PeftModel.from_pretrained(base, tmp_path, strict=strict)
        assert torch.equal(logits(base), logits(MODELS["llama"]()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peftrs.PromptTuningConfig(num_virtual_tokens=2), "task_type"),
        (peftrs.PromptTuningConfig(task_type="CAUSAL_LM"), "num_virtual_tokens"),
        (
            peftrs.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=15),
            "cannot be shared",
        ),
    ],
)
def test_what_is_missing_is_said(config: Any, message: str) -> None:
    base = MODELS["gpt2"]()
    with pytest.raises(ConfigError, match=message):
        peftrs.get_peft_model(base, config)
    assert "prompt_encoder" not in base._modules


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(ConfigError, match="is a prompt"):
        peftrs.inject_adapter_in_model(copy.deepcopy(KINDS["tokens"]), MODELS["llama"]())
    model = prompted()
    with pytest.raises(AdapterError, match="4 dimensions"):
        model(input_ids=TOKENS, attention_mask=torch.ones(3, 1, 6, 6))
    with pytest.raises(AdapterError, match="to stand before"):
        model(attention_mask=LEFT)
    model.disable_adapter_layers()
    with pytest.raises(AdapterError, match="no prompt is active"):
        model.get_prompt(1)
    several = Case("MultitaskPromptTuningConfig", "llama", {"num_tasks": 2})
    with pytest.raises(AdapterError, match="task_ids"):
        peftrs.get_peft_model(MODELS["llama"](), several.configure(peftrs))(input_ids=TOKENS)


def test_every_kind_of_prompt_has_a_case() -> None:
    configs = {
        peftrs.PEFT_TYPE_TO_CONFIG_MAPPING[name].__name__ for name in peftrs.PEFT_TYPE_TO_CONFIG_MAPPING
    }
    prompts = {name for name in configs if issubclass(getattr(peftrs, name), peftrs.PromptLearningConfig)}
    assert prompts == {case.config for case in CASES} - {"AdaptionPromptConfig"}


def test_keys_and_values_to_be_trained_are_refused_under_checkpointing_from_the_start(tmp_path: Path) -> None:
    config = peftrs.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peftrs.get_peft_model(MODELS["llama"](), copy.deepcopy(config)).save_pretrained(tmp_path)
    base = MODELS["llama"]()
    checkpoint(base)
    with pytest.raises(AdapterError, match="does not work with gradient checkpointing"):
        peftrs.get_peft_model(base, config)
    assert not hasattr(base, "peft_config")
    assert logits(peftrs.PeftModel.from_pretrained(base, tmp_path)).isfinite().all()
