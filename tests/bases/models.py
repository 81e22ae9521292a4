"""A small Llama, written to disk and loaded again quantized, as users load them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.bases.formats import hqq

TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))
LAYERS = 2


def settings(kind: str) -> Any:
    """What transformers is told to quantize by."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def llama() -> Any:
    """The unquantized model, the same at every call."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, bos_token_id=1, eos_token_id=2, **sizes))


def write(folder: Path) -> None:
    """The same on disk."""
    llama().save_pretrained(folder)


def load(folder: Path, kind: str | None, dtype: torch.dtype = torch.float32) -> Any:
    """The model, quantized if a kind is given; not every transformers quantizes by HQQ, whose layers are put
    in here.
    """
    if kind is not None:
        pytest.importorskip({"nf4": "bitsandbytes", "int8": "bitsandbytes"}.get(kind, kind))
    if kind == "hqq":
        model = load(folder, None, dtype)
        for name, layer in list(model.model.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, last = name.rpartition(".")
                setattr(model.model.get_submodule(parent), last, hqq(4, dtype)(layer))
        model.hqq_quantized = model.is_quantized = True
        return model
    options: dict[str, Any] = (
        {} if kind is None else {"quantization_config": settings(kind), "device_map": "cpu"}
    )
    options["dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"] = dtype
    return AutoModelForCausalLM.from_pretrained(folder, **options)
