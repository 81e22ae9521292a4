"""Which layers an adapter is for when its config does not say, by the `model_type` of transformers'
configs.
"""

from __future__ import annotations

from peftrs.config import PeftType

QV = ("q_proj", "v_proj")
FUSED = ("query_key_value",)
QUERY = ("query", "value")

ATTENTION: dict[str, tuple[str, ...] | str] = {
    "t5": ("q", "v"), "mt5": ("q", "v"), "bart": QV, "gpt2": ("c_attn",), "bloom": FUSED, "blip-2": ("q", "v",
    "q_proj", "v_proj"),
    "opt": QV, "gptj": QV, "gpt_neox": FUSED, "gpt_neo": QV, "bert": QUERY, "roberta": QUERY,
    "xlm-roberta": QUERY,
    "electra": QUERY, "deberta-v2": ("query_proj", "value_proj"), "deberta": ("in_proj",), "layoutlm": QUERY,
    "llama": QV,
    "llama4": QV, "chatglm": FUSED, "gpt_bigcode": ("c_attn",), "mpt": ("Wqkv",), "RefinedWebModel": FUSED,
    "RefinedWeb": FUSED,
    "falcon": FUSED, "btlm": ("c_proj", "c_attn"), "codegen": ("qkv_proj",), "mistral": QV, "mixtral": QV,
    "stablelm": QV,
    "phi": ("q_proj", "v_proj", "fc1", "fc2"), "gemma": QV, "gemma2": QV, "gemma3_text": QV,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)", "qwen2": QV, "qwen3": QV,
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"), "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}  # fmt: skip
"""For methods that change what attention projects, LoRA first of all."""

# By model type: the attention layers whose outputs are scaled, and the feed-forward layers whose inputs are.
_SCALED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "t5": (("k", "v"), ("wo",)), "mt5": (("k", "v", "wi_1"), ()), "gpt2": (("c_attn",), ("mlp.c_proj",)),
    "bloom": (FUSED, ("mlp.dense_4h_to_h",)), "roberta": (("key", "value"), ("output.dense",)),
    "opt": (("q_proj", "k_proj"), ("fc2",)), "gptj": (QV, ("fc_out",)), "gpt_neox": (FUSED,
    ("dense_4h_to_h",)),
    "gpt_neo": (QV, ("c_proj",)), "bart": (QV, ("fc2",)), "gpt_bigcode": (("c_attn",), ("mlp.c_proj",)),
    "llama": (("k_proj", "v_proj"), ("down_proj",)), "llama4": (QV, ("down_proj",)),
    "mistral": (("k_proj", "v_proj"), ("down_proj",)), "mixtral": (("k_proj", "v_proj"), ("w2",)),
    "bert": (("key", "value"), ("output.dense",)), "deberta-v2": (("key_proj", "value_proj"),
    ("output.dense",)),
    "deberta": (("in_proj",), ("output.dense",)), "RefinedWebModel": (FUSED, ("dense_4h_to_h",)),
    "RefinedWeb": (FUSED, ("dense_4h_to_h",)), "falcon": (FUSED, ("dense_4h_to_h",)), "phi": (QV, ("fc2",)),
    "gemma": (QV, ("down_proj",)), "gemma2": (QV, ("down_proj",)), "gemma3_text": (QV, ("down_proj",)),
    "qwen2": (QV, ("down_proj",)), "qwen3": (QV, ("down_proj",)),
}  # fmt: skip

SCALED: dict[str, tuple[str, ...] | str] = {
    kind: attention + forward for kind, (attention, forward) in _SCALED.items()
}
"""For IA³: keys, values and feed-forward layers."""
FEEDFORWARD = {kind: forward for kind, (_, forward) in _SCALED.items()}
"""For IA³: those of its layers whose inputs are scaled."""

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING = (
    ATTENTION
)
TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = SCALED
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = FEEDFORWARD
"""PEFT's names of these tables."""

PROMPTED: dict[str, tuple[str, ...] | str] = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}
"""For adaption prompts: what the attention modules are called."""

TARGETS: dict[PeftType, dict[str, tuple[str, ...] | str]] = {
    PeftType.LORA: ATTENTION,
    PeftType.OFT: ATTENTION,
    PeftType.IA3: SCALED,
    PeftType.ADAPTION_PROMPT: PROMPTED,
}
"""The table of each method."""

# Layers that a fused kernel of these models reads past, so that an adapter on them would be skipped without a
# word.
SKIPPED = {
    kind: frozenset({"out_proj", "conv1d"})
    for kind in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
}
SKIPPING = frozenset({PeftType.LORA, PeftType.ADALORA, PeftType.XLORA, PeftType.RANDLORA})
"""The methods for which that is known."""
