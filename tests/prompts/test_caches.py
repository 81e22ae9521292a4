"""A prompt in every kind of cache that transformers has: the texts are those of the default one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import peftrs
from tests.prompts.cases import LEFT, LLAMA, MASK, MODELS, TOKENS

pytestmark = pytest.mark.skipif(
    not hasattr(transformers.LlamaForCausalLM, "_prepare_static_cache"),
    reason="this transformers prepares caches in another way",
)
KINDS = {"tokens": peftrs.PromptTuningConfig, "cache": peftrs.PrefixTuningConfig}
SLIDING = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 40,
    "sliding_window": 5, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def caches(config: Any) -> dict[str, dict[str, Any]]:
    """The arguments of `generate` for each kind of cache."""
    return {
        "none": {"use_cache": False},
        "in parts": {"prefill_chunk_size": 3},
        "dynamic": {"past_key_values": DynamicCache(config=config)},
        "dynamic, of no model": {"past_key_values": DynamicCache()},
        "static": {"cache_implementation": "static"},
        "static, given": {"past_key_values": StaticCache(config=config, max_cache_len=40)},
        "quantized": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    }


def sliding() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SLIDING, num_hidden_layers=2))


def hybrid() -> Any:
    kinds = ["sliding_attention", "full_attention"] * 2
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SLIDING, num_hidden_layers=4, layer_types=kinds)
    )


MAKE: dict[str, Callable[[], Any]] = {
    "full": lambda: transformers.LlamaForCausalLM(LLAMA),
    "sliding": sliding,
    "hybrid": hybrid,
}


def prompted(base: Any, config: Any) -> Any:
    model = peftrs.get_peft_model(base.eval(), config).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter += torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", MAKE)
def test_the_texts_are_the_same_in_every_cache(kind: str, layers: str) -> None:
    model = prompted(MAKE[layers](), KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=4))
    options = {"input_ids": TOKENS, "attention_mask": LEFT, "max_new_tokens": 6, "min_new_tokens": 6}
    expected = model.generate(**options)
    assert not torch.equal(expected, MAKE["full"]().eval().generate(**options))
    for name, chosen in caches(model.config).items():
        if name == "quantized" and (
            layers != "full" or not hasattr(transformers.cache_utils, "Fp8QuantizedLayer")
        ):
            continue  # transformers quantizes full attention alone
        assert torch.equal(model.generate(**options, **chosen), expected), name
    beams = model.generate(**options, num_beams=3)
    assert torch.equal(model.generate(**options, num_beams=3, cache_implementation="static"), beams)


@pytest.mark.parametrize("kind", KINDS)
def test_both_caches_of_an_encoder_decoder_take_a_prompt(kind: str) -> None:
    model = prompted(MODELS["t5"](), KINDS[kind](task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4))
    options = {"input_ids": TOKENS, "attention_mask": MASK, "max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(model.generate(**options, cache_implementation="static"), model.generate(**options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache_is_filled_call_by_call(kind: str) -> None:
    model = prompted(MODELS["llama"](), KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=4))
    with torch.no_grad():
        whole = model(input_ids=TOKENS).logits[:, -TOKENS.shape[1] :]
        cache = StaticCache(config=model.config, max_cache_len=16)
        first = model(input_ids=TOKENS[:, :4], past_key_values=cache).logits[:, -4:]
        rest = model(
            input_ids=TOKENS[:, 4:], past_key_values=cache, attention_mask=torch.ones_like(TOKENS)
        ).logits
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=0, atol=1e-5)


def test_generating_leaves_nothing_on_the_model() -> None:
    model = prompted(
        MODELS["llama"](), peftrs.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    base = model.get_base_model()
    before = set(base.__dict__)
    model.generate(input_ids=TOKENS, max_new_tokens=2, cache_implementation="static")
    assert set(base.__dict__) - before <= {"_previous_max_cache_length"}
    assert torch.equal(
        copy.deepcopy(base).generate(TOKENS, max_new_tokens=2), base.generate(TOKENS, max_new_tokens=2)
    )
