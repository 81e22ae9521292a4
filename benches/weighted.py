"""Combining two adapters of rank 16: the same `add_weighted_adapter` in both libraries, undone after each
run; converting one.

    python benches/run.py --rows weighted [--quick] [--only NAME] [--runs N] [--output FILE]

A run is timed only after both libraries' changes of the weight agree to 1e-5. Random pruning draws other
numbers in each library and is left out. Each timed run follows one of the same side that is not: the C
library gives memory that was freed back to the system sooner or later, 4 ms or more for what PEFT's
decomposition of 2048² leaves, and the first run after that would wait for it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from run import Row, Taken, both_agree
from torch import nn

warnings.filterwarnings("ignore")


def two_adapters(library: Any, width: int, layers: int) -> Any:
    torch.manual_seed(0)
    configs = [
        library.LoraConfig(r=16, lora_alpha=alpha, target_modules=[str(at) for at in range(layers)])
        for alpha in (16, 32)
    ]
    base = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    model = library.get_peft_model(base, configs[0], "a")
    model.add_adapter("b", configs[1])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("a", "b"):
            for layer in model.base_model.model:
                for factor in (layer.lora_A[name].weight, layer.lora_B[name].weight):
                    factor.copy_(torch.randn(factor.shape, generator=generator) / 16)
    return model


def combine(model: Any, kind: str) -> None:
    density = None if kind in ("cat", "svd") else 0.5
    model.base_model.add_weighted_adapter(
        ["a", "b"], [0.7, -0.4], "sum", combination_type=kind, density=density
    )


def settled(run: Callable[[], object]) -> Callable[[], Taken]:
    """The second of two runs, which finds memory as the same work left it."""

    def timed() -> Taken:
        run()
        before, start = time.process_time(), time.perf_counter()
        run()
        return Taken((time.perf_counter() - start) * 1e3, (time.process_time() - before) * 1e3)

    return timed


def work(kind: str, width: int, layers: int, name: str, quick: bool) -> Callable[[], object]:
    model = two_adapters(import_module(name), 128 if quick else width, layers)

    def run() -> None:
        combine(model, kind)
        model.delete_adapter("sum")

    return settled(run)


def check(kind: str, width: int, layers: int, quick: bool) -> None:
    def change(library: Any, quick: bool) -> torch.Tensor:
        model = two_adapters(library, 128 if quick else width, layers)
        combine(model, kind)
        found = [
            layer.scaling["sum"] * layer.lora_B["sum"].weight @ layer.lora_A["sum"].weight
            for layer in model.base_model.model
        ]
        return torch.stack(found).detach()

    both_agree(change, quick, 1e-5)


def convert(name: str, quick: bool) -> Callable[[], object]:
    library = import_module(name)
    model = two_adapters(library, 128 if quick else 2048, 1)
    return settled(lambda: library.convert_to_lora(model, 16, "a"))


def check_converted(quick: bool) -> None:
    def change(library: Any, quick: bool) -> torch.Tensor:
        _, tensors = library.convert_to_lora(two_adapters(library, 128 if quick else 2048, 1), 16, "a")
        return tensors["base_model.model.0.lora_B.weight"] @ tensors["base_model.model.0.lora_A.weight"]

    both_agree(change, quick, 1e-5)


CASES = [
    ("svd", 2048, 1),
    ("svd", 2048, 4),
    ("svd", 4096, 1),
    ("cat", 4096, 1),
    ("ties_svd", 1024, 1),
    ("magnitude_prune_svd", 1024, 1),
]
ROWS = [
    Row(f"{kind}, {case[1]} of {case[0]}²", partial(work, kind, *case), partial(check, kind, *case))
    for kind, *case in CASES
]
ROWS.append(Row("convert_to_lora of rank 16, 1 of 2048²", convert, check_converted))
