"""From import to the hundredth adapter: what a user waits for between training steps, peftrs beside PEFT.

    python benches/lifecycle.py [--quick] [--only NAME] [--runs N] [--output FILE]

Imports are timed in fresh processes, after `import torch`. "70B" is a Llama of that shape on the meta device,
560 layers adapted; "8 layers" has 56. The adapter file is that of the large model, r=16 in float32, 790 MB;
"read" is the time to read its bytes into fresh memory. Before loading is timed, every tensor of every path is
compared with the file's bits.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from run import Row, Taken, options, run
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

warnings.filterwarnings("ignore")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = "from {0} import LoraConfig, get_peft_model, PeftModel"
IMPORTED = """
import sys, time, torch
before, start = len(sys.modules), time.perf_counter()
{}
print((time.perf_counter() - start) * 1e3, len(sys.modules) - before, "transformers" in sys.modules)
"""


def imported(statement: str, name: str, quick: bool) -> Callable[[], object]:
    command = [sys.executable, "-P", "-W", "ignore", "-c", IMPORTED.format(statement.format(name))]

    def once() -> float:
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        milliseconds, modules, transformers = told[-3:]
        if once.first:  # type: ignore[attr-defined]
            print(
                f"  {name}: {modules} modules, {'with' if transformers == 'True' else 'without'} transformers"
            )
            once.first = False  # type: ignore[attr-defined]
        return float(milliseconds)

    once.first = True  # type: ignore[attr-defined]
    return once


def large(quick: bool) -> nn.Module:
    sizes = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
    settings = LlamaConfig(num_hidden_layers=2 if quick else 80, **sizes)
    with torch.device("meta"):
        return LlamaForCausalLM(settings)


def eight_layers(quick: bool) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1 if quick else 8, **sizes))


def config(library: Any, rank: int = 16) -> Any:
    return library.LoraConfig(r=rank, target_modules=TARGETS)


def timed(work: Callable[[], object]) -> Taken:
    start, before = time.perf_counter(), time.process_time()
    work()
    return Taken((time.perf_counter() - start) * 1e3, (time.process_time() - before) * 1e3)


def inject(lazy: bool, name: str, quick: bool) -> Callable[[], object]:
    library = import_module(name)

    def once() -> Taken:
        base = large(quick)
        return timed(lambda: library.get_peft_model(base, config(library), low_cpu_mem_usage=lazy))

    return once


def next_adapter(name: str, quick: bool) -> Callable[[], object]:
    """One adapter more where there are 1 or 99; it is taken out again, which is not timed."""
    library, _, there = name.partition(" beside ")
    peft = import_module(library)
    model = peft.get_peft_model(eight_layers(quick), config(peft, 8), "a0")
    for index in range(1, min(int(there), 5) if quick else int(there)):
        model.add_adapter(f"a{index}", config(peft, 8))

    def once() -> Taken:
        elapsed = timed(lambda: model.add_adapter("more", config(peft, 8)))
        model.delete_adapter("more")
        return elapsed

    return once


def hundred(name: str, quick: bool) -> Callable[[], object]:
    peft = import_module(name)

    def once() -> None:
        model = peft.get_peft_model(eight_layers(quick), config(peft, 8), "a0")
        for index in range(1, 4 if quick else 100):
            model.add_adapter(f"a{index}", config(peft, 8))

    return once


@cache
def two_adapters(name: str, quick: bool) -> Any:
    peft = import_module(name)
    model = peft.get_peft_model(large(quick), config(peft), "a", low_cpu_mem_usage=True)
    model.add_adapter("b", config(peft), low_cpu_mem_usage=True)
    return model


def disable(name: str, quick: bool) -> Callable[[], object]:
    model = two_adapters(name, quick)

    def once() -> None:
        with model.disable_adapter():
            pass

    return once


def switch(name: str, quick: bool) -> Callable[[], object]:
    model, turns = two_adapters(name, quick), itertools.cycle("ba")
    return lambda: model.set_adapter(next(turns))


def check_switch(quick: bool) -> None:
    """That switching trains the one that acts, and it alone."""
    for name in ("peftrs", "peft"):
        model = two_adapters(name, quick)
        for chosen in "ba":
            model.set_adapter(chosen)
            for key, parameter in model.named_parameters():
                if parameter.requires_grad != (f".{chosen}." in key):
                    raise SystemExit(
                        f"{name}: {key} has requires_grad={parameter.requires_grad}: nothing is timed"
                    )


@cache
def saved(quick: bool) -> tempfile.TemporaryDirectory[str]:
    """The folder of the large model's adapter, with random values, which PEFT wrote."""
    peft, folder = import_module("peft"), tempfile.TemporaryDirectory()
    model = peft.get_peft_model(large(quick), config(peft), low_cpu_mem_usage=True)
    torch.manual_seed(0)
    state = {name: torch.randn(one.shape) for name, one in peft.get_peft_model_state_dict(model).items()}
    model.save_pretrained(folder.name, state_dict=state)
    from safetensors.torch import save_file

    save_file(state, Path(folder.name, "adapter_model.safetensors"), {"format": "pt"})
    return folder


PATHS: dict[str, Callable[[Any, nn.Module, str], Any]] = {
    "from_pretrained": lambda peft, base, folder: peft.PeftModel.from_pretrained(base, folder),
    "from_pretrained lazy": lambda peft, base, folder: peft.PeftModel.from_pretrained(
        base, folder, low_cpu_mem_usage=True
    ),
}


def load(path: str, name: str, quick: bool) -> Callable[[], object]:
    folder = saved(quick).name
    if name == "read":
        return lambda: Path(folder, "adapter_model.safetensors").read_bytes() and None
    peft = import_module(name)

    def once() -> Taken:
        base = large(quick)
        return timed(lambda: PATHS[path](peft, base, folder))

    return once


def load_more(name: str, quick: bool) -> Callable[[], object]:
    folder = saved(quick).name
    if name == "read":
        return load("", name, quick)
    peft = import_module(name)
    model = peft.get_peft_model(large(quick), config(peft), low_cpu_mem_usage=True)

    def once() -> Taken:
        elapsed = timed(lambda: model.load_adapter(folder, "more", low_cpu_mem_usage=True))
        model.delete_adapter("more")
        return elapsed

    return once


def check_load(quick: bool) -> None:
    folder = saved(quick).name
    held = load_file(Path(folder, "adapter_model.safetensors"))
    library = import_module("peftrs")
    models = {path: make(library, large(quick), folder) for path, make in PATHS.items()}
    narrow = large(quick).to(torch.bfloat16)
    models["over bfloat16"] = library.PeftModel.from_pretrained(narrow, folder)
    for path, model in models.items():
        found = library.get_peft_model_state_dict(model)
        if found.keys() != held.keys() or not all(torch.equal(found[name], held[name]) for name in held):
            raise SystemExit(f"{path}: a tensor differs from the file's: nothing is timed")


def unchecked(quick: bool) -> None:
    """What is built here is compared elsewhere."""


MORE = ("peftrs beside 1", "peftrs beside 99", "peft beside 1", "peft beside 99")
ROWS = [
    Row("import", partial(imported, "import {0}"), unchecked),
    Row("import of three names", partial(imported, NAMES), unchecked),
    Row("get_peft_model, 70B, lazy", partial(inject, True), unchecked),
    Row("get_peft_model, 70B", partial(inject, False), unchecked),
    Row("one adapter more, 8 layers", next_adapter, unchecked, MORE),
    Row("100 adapters, 8 layers", hundred, unchecked, most=3),
    Row("disable_adapter, 70B", disable, unchecked),
    Row("set_adapter, 70B", switch, check_switch),
    Row("from_pretrained, 790 MB", partial(load, "from_pretrained"), check_load, ("peftrs", "read", "peft")),
    Row(
        "from_pretrained lazy, 790 MB",
        partial(load, "from_pretrained lazy"),
        unchecked,
        ("peftrs", "read", "peft"),
    ),
    Row("load_adapter, 790 MB", load_more, unchecked, ("peftrs", "read", "peft")),
]


if __name__ == "__main__":
    run(ROWS, options(__doc__).parse_args())
