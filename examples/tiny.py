"""Tiny random models with a tokenizer of a few words, so that the examples run in seconds without downloading
anything.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = (
    "a", "the", "cat", "dog", "bird", "sat", "ran", "flew", "slept", "on", "under", "over", "mat", "tree",
    "house", "user",
    "assistant", ":", "is", "good", "bad",
)  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
CHAT = """{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + '</s> ' }}{% endfor %}\
{% if add_generation_prompt %}assistant : {% endif %}"""


def sentences(count: int = 16) -> list[str]:
    """Sentences out of the vocabulary."""
    return [
        f"the {WORDS[2 + n % 3]} {WORDS[5 + n % 4]} {WORDS[9 + n % 3]} the {WORDS[12 + n % 3]}"
        for n in range(count)
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of a small vocabulary, with a chat template."""
    inner = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )
    made.chat_template = CHAT
    return made


def llama(kind: Any = LlamaForCausalLM, **settings: Any) -> Any:
    """A Llama, the same on every call."""
    torch.manual_seed(0)
    return kind(
        LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128, **settings})
    )


def bert(kind: Any = BertModel, **settings: Any) -> Any:
    """A BERT without dropout, the same on every call."""
    torch.manual_seed(0)
    return kind(
        BertConfig(**{**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **settings})
    )


def saved(model: Any, folder: Path) -> str:
    """The folder, with the model and the tokenizer in it."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def stable_diffusion() -> Any:
    """A Stable Diffusion pipeline, the same on every call."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            **{name: SIZES[name] for name in SIZES if name != "initializer_range"}, projection_dim=16
        )
    )
    parts = {
        "unet": unet,
        "vae": vae,
        "text_encoder": text,
        "tokenizer": tokenizer(),
        "scheduler": DDIMScheduler(),
    }
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
