"""The rows: journeys that users wait for, on the skeleton of a large model (all layers, tiny matrices) or on
one real layer.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from run import Row, both_agree
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
warnings.filterwarnings("ignore")


def skeleton(quick: bool) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2 if quick else 32,
            num_attention_heads=2,
            vocab_size=64,
        )
    )


def config(library: Any, **extra: Any) -> Any:
    return library.LoraConfig(r=8, target_modules=ALL, init_lora_weights=False, **extra)


def inject(name: str, quick: bool) -> Callable[[], object]:
    library = import_module(name)
    return lambda: library.get_peft_model(skeleton(quick), config(library))


def many(name: str, quick: bool) -> Callable[[], object]:
    library, count = import_module(name), 3 if quick else 20

    def work() -> None:
        model = library.get_peft_model(skeleton(quick), config(library))
        for index in range(count):
            model.add_adapter(f"other{index}", config(library))

    return work


def disable(name: str, quick: bool) -> Callable[[], object]:
    library = import_module(name)
    model = library.get_peft_model(skeleton(quick), config(library))

    def work() -> None:
        for _ in range(10):
            with model.disable_adapter():
                pass

    return work


def load(name: str, quick: bool) -> Callable[[], object]:
    library, folder, base = import_module(name), tempfile.mkdtemp(), skeleton(quick)
    import_module("peft").get_peft_model(skeleton(quick), config(import_module("peft"))).save_pretrained(
        folder
    )
    return lambda: library.PeftModel.from_pretrained(base, folder).unload()


def one_layer(library: Any, quick: bool) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Linear(256 if quick else 4096, 256 if quick else 4096, bias=False, dtype=torch.bfloat16)
    )
    torch.manual_seed(1)
    model = library.get_peft_model(base, library.LoraConfig(r=16, target_modules=["0"]))
    generator = torch.Generator().manual_seed(2)
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 16)
    return model


def merge(name: str, quick: bool) -> Callable[[], object]:
    model = one_layer(import_module(name), quick)

    def work() -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    return work


def forward(name: str, quick: bool) -> Callable[[], object]:
    library = import_module(name)
    model = library.get_peft_model(
        nn.Sequential(nn.Linear(64, 64)), library.LoraConfig(r=8, target_modules=["0"])
    )
    x = torch.randn(4, 64)

    def work() -> None:
        for _ in range(200):
            model(x).sum().backward()

    return work


def merged_weight(library: Any, quick: bool) -> torch.Tensor:
    return next(one_layer(library, quick).merge_and_unload().parameters()).float()


def reloaded(library: Any, quick: bool) -> torch.Tensor:
    theirs = import_module("peft")
    torch.manual_seed(3)
    with tempfile.TemporaryDirectory() as folder:
        theirs.get_peft_model(skeleton(quick), config(theirs)).save_pretrained(folder)
        model = library.PeftModel.from_pretrained(skeleton(quick), folder).eval()
        with torch.no_grad():
            return model(input_ids=torch.arange(8)[None]).logits


def agree_on_files(quick: bool) -> None:
    torch.manual_seed(3)
    both_agree(reloaded, quick, 1e-5)


ROWS = [
    Row("inject 224 layers", inject, agree_on_files),
    Row("add 20 adapters more", many, agree_on_files),
    Row("disable_adapter, 10 times", disable, agree_on_files),
    Row("load an adapter of 224 layers", load, agree_on_files),
    Row("merge and unmerge 4096x4096 bf16", merge, lambda quick: both_agree(merged_weight, quick, 1e-2)),
    Row("200 steps of one small layer", forward, agree_on_files),
]
