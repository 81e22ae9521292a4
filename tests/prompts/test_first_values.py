"""Where prompts begin: with a text's tokens, with the cache of a text, with another adapter's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import peftrs
from peftrs import CheckpointError, ConfigError
from tests.prompts.cases import MODELS, TOKENS

WORDS = ["<unk>", "a", "b", "good", "bad", "film"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    own = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    own.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>").save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def text_config(tokenizer: str, count: int, **options: Any) -> peftrs.PromptTuningConfig:
    return peftrs.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=count, prompt_tuning_init="TEXT",
        prompt_tuning_init_text="good film bad",
        tokenizer_name_or_path=tokenizer, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("count", "tokens"), [(2, [3, 5]), (3, [3, 5, 4]), (7, [3, 5, 4, 3, 5, 4, 3])])
def test_a_text_is_cut_or_repeated(tokenizer: str, count: int, tokens: list[int]) -> None:
    base = MODELS["llama"]()
    model = peftrs.get_peft_model(
        base, text_config(tokenizer, count, tokenizer_kwargs={"trust_remote_code": True})
    )
    assert torch.equal(
        model.prompt_encoder["default"].embedding.weight, base.get_input_embeddings().weight[tokens]
    )


def test_a_text_without_tokens_is_refused(tokenizer: str) -> None:
    config = text_config(tokenizer, 2)
    config.prompt_tuning_init_text = ""
    with pytest.raises(ConfigError, match="has no tokens"):
        peftrs.get_peft_model(MODELS["llama"](), config)
    with pytest.raises(ConfigError, match="tokenizer_name_or_path can't be None"):
        peftrs.PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a")
    with pytest.raises(ConfigError, match="tokenizer_kwargs only valid"):
        peftrs.PromptTuningConfig(tokenizer_kwargs={"a": 1})


def test_drawn_tokens_are_rows_of_the_vocabulary() -> None:
    base = MODELS["gpt2"]()
    config = peftrs.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=9, prompt_tuning_init="SAMPLE_VOCAB"
    )
    rows = peftrs.get_peft_model(base, config).prompt_encoder["default"].embedding.weight
    assert all((row == base.get_input_embeddings().weight).all(1).any() for row in rows)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["CartridgeConfig", "PrefixTuningConfig"])
def test_a_cartridge_of_a_text_stands_for_the_text(kind: str, name: str) -> None:
    base = MODELS[name]()
    text = torch.tensor([[7, 8, 9, 10, 11]])
    after = TOKENS[:1]
    with torch.no_grad():
        cache = base(text, use_cache=True).past_key_values
        expected = base(torch.cat((text, after), 1)).logits[:, text.shape[1] :]
    model = peftrs.get_peft_model(
        base, getattr(peftrs, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ).eval()
    peftrs.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    with torch.no_grad():
        torch.testing.assert_close(model(after).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at least 5"):
        peftrs.initialize_kv_prefix_from_past_key_values(
            model, past_key_values=MODELS[name]()(text[:, :3]).past_key_values
        )


def test_a_cartridge_is_begun_with_a_text_by_its_tokenizer(tokenizer: str) -> None:
    base = MODELS["llama"]()
    own = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    model = peftrs.get_peft_model(
        base, peftrs.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    taken = peftrs.initialize_kv_prefix_from_text(model, own, text="good film bad a b")
    with torch.no_grad(), model.disable_adapter():
        cache = model(torch.tensor([[3, 5, 4, 1, 2]]), use_cache=True).past_key_values
    assert torch.equal(taken, peftrs.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=3))
    encoder = model.prompt_encoder["default"]
    assert torch.equal(encoder.weight, taken)
    assert [name for name, parameter in encoder.named_parameters() if parameter.requires_grad] == [
        "trainable_embedding"
    ]
    prompt = peftrs.get_peft_model(MODELS["llama"](), text_config(tokenizer, 2))
    with pytest.raises(ValueError, match="CARTRIDGE or PREFIX_TUNING"):
        peftrs.initialize_kv_prefix_from_past_key_values(prompt, past_key_values=cache)


@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_task_begins_with_others(init: str, tmp_path: Path) -> None:
    shared, cols, rows = torch.randn(4, 16), torch.randn(3, 4, 2), torch.randn(3, 2, 16)
    source = {"prompt_embeddings": shared, "prefix_task_cols": cols, "prefix_task_rows": rows}
    save_file(source, tmp_path / "source.safetensors")
    options = {
        "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_ranks": 2, "prompt_tuning_init": init,
        "prompt_tuning_init_state_dict_path": str(tmp_path / "source.safetensors"),
        "prompt_tuning_init_task": 2,
    }  # fmt: skip
    encoder = peftrs.get_peft_model(
        MODELS["llama"](), peftrs.MultitaskPromptTuningConfig(**options)
    ).prompt_encoder["default"]
    assert torch.equal(encoder.embedding.weight, shared)
    if init == "EXACT_SOURCE_TASK":
        assert torch.equal(encoder.prefix_task_cols, cols[2:])
    elif init == "AVERAGE_SOURCE_TASKS":
        assert torch.equal(encoder.prefix_task_rows, rows.mean(0, keepdim=True))
    else:
        assert encoder.prefix_task_rows.abs().max() < 0.2
        return
    with pytest.raises(ConfigError, match="has shape"):
        peftrs.get_peft_model(
            MODELS["llama"](), peftrs.MultitaskPromptTuningConfig(**options | {"num_tasks": 2})
        )
    (tmp_path / "source.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError):
        peftrs.get_peft_model(MODELS["llama"](), peftrs.MultitaskPromptTuningConfig(**options))
    with pytest.raises(ConfigError, match="needs to be specified"):
        peftrs.MultitaskPromptTuningConfig(prompt_tuning_init=init)


def test_a_context_tells_how_far_it_was_moved_and_may_move() -> None:
    config = peftrs.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5], cpt_tokens_type_mask=[1, 2, 4])
    model = peftrs.get_peft_model(MODELS["llama"](), config)
    encoder: Any = model.prompts.encoder("default")
    with torch.no_grad():
        encoder.delta_embedding.weight.fill_(1.0)
    moved = encoder.get_projection()
    torch.testing.assert_close(moved.norm(dim=1), encoder.get_epsilon())
    assert torch.equal(encoder.delta_embedding.weight, torch.ones_like(moved))
    model(TOKENS)
    torch.testing.assert_close(encoder.delta_embedding.weight.detach(), moved)


def test_the_head_size_follows_where_the_model_s_config_does_not_say_it() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    base = Qwen2ForCausalLM(Qwen2Config(**sizes, intermediate_size=24, vocab_size=40)).eval()
    model = peftrs.get_peft_model(
        base, peftrs.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    assert model.prompts.encoder("default").embedding.weight.shape == (
        3,
        2 * 2 * 2 * 4,
    )  # keys and values, layers, heads, sizes
    assert model(TOKENS).logits.shape == (*TOKENS.shape, 40)
