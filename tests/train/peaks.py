"""What a process does with a model of some size, phase by phase, and the most memory of its own that each
phase took.

Memory is what the kernel calls anonymous: pages of files that are mapped do not count. The process that
watches polls it, since the kernel keeps no record of its peak.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

PATIENCE = 120.0
"""Seconds for one phase."""
MODEL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = torch.arange(16).reshape(1, 16)


def write(folder: Path, layers: int) -> int:
    """Writes a Llama in bfloat16; returns its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **MODEL)).bfloat16()
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def loaded(folder: Path, kind: str) -> Any:
    """The model: in memory, its linear layers in nf4 or int8, or on the disk by accelerate."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if kind in ("nf4", "int8"):
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
        bits = BitsAndBytesConfig(**settings if kind == "nf4" else {"load_in_8bit": True})
        options = {"quantization_config": bits, "device_map": "cpu"}
    if kind == "disk":
        places = {
            "model.layers": "disk",
            **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
        }
        options = {"device_map": places, "offload_folder": str(folder / "offload")}
    model = AutoModelForCausalLM.from_pretrained(folder / "base", torch_dtype=torch.bfloat16, **options)
    for parameter in model.parameters() if kind == "memory" else ():
        # What files are mapped for becomes memory of the process's own where it is written, which is no copy.
        parameter.data = parameter.data.clone()
    return model


def steps(model: Any, **inputs: torch.Tensor) -> None:
    """Two steps of training."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(2):
        given = model.train()(**inputs)
        (given.loss if hasattr(given, "loss") else given.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def warm(folder: Path) -> None:
    """What libraries import and set up at their first use."""
    from transformers.models.llama import modeling_llama  # noqa: F401

    import peftrs

    small: Any = peftrs.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), peftrs.LoraConfig(target_modules=["0"])
    )
    steps(small, input=torch.ones(2, 4))
    small.save_pretrained(folder / "warm")
    small.load_adapter(folder / "warm", "second")
    small.merge_and_unload()


def live(folder: Path, kind: str, phase: Callable[[str], None]) -> None:
    """Load, inject, train, save, load again, merge, unmerge, merge for good, save whole."""
    import transformers

    import peftrs

    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    warm(folder)
    phase("load")
    model = loaded(folder, kind)
    quantized = kind in ("nf4", "int8")
    phase("prepare")
    if quantized:
        peftrs.prepare_model_for_kbit_training(model)
    phase("inject")
    config = peftrs.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    peft: Any = peftrs.get_peft_model(model, config)
    phase("train")
    steps(peft, input_ids=TOKENS, labels=TOKENS)
    phase("save")
    peft.save_pretrained(folder / "adapter")
    phase("load adapter")
    peft.load_adapter(folder / "adapter", "second")
    if not quantized:
        phase("merge and unmerge")
        peft.merge_adapter()
        peft.unmerge_adapter()
    with torch.no_grad():
        # Enough for int8 to hold.
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    phase("merge for good")
    peft = peft.merge_and_unload(dtype=torch.bfloat16 if kind == "nf4" else None)
    phase("save whole")
    peft.save_pretrained(folder / "merged", max_shard_size="20MB")


def _run(target: Callable[..., None], line: Connection, *given: Any) -> None:
    def phase(name: str) -> None:
        gc.collect()
        line.send(name)
        line.recv()

    target(*given, phase)
    phase("")


def watched(target: Callable[..., None], *given: Any) -> dict[str, tuple[int, int]]:
    """Runs it in a process of its own: for each phase how much that held at first, and how much more at most,
    in bytes.
    """
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(target, there, *given))
    process.start()
    there.close()
    found: dict[str, tuple[int, int]] = {}
    name = ""
    try:
        since = time.monotonic()
        while True:
            now = anonymous(process.pid)
            if name:
                first, most = found[name]
                found[name] = first, max(most, now - first)
            if here.poll():
                name = here.recv()
                if not name:
                    here.send(None)
                    return found
                found[name] = anonymous(process.pid), 0
                since = time.monotonic()
                here.send(None)
            elif time.monotonic() - since > PATIENCE:
                raise TimeoutError(name)
            time.sleep(0.0005)
    except (EOFError, FileNotFoundError, StopIteration):
        raise RuntimeError(f"the process ended in {name!r}") from None
    finally:
        process.join(20)
        process.kill()


def anonymous(process: int | None) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
