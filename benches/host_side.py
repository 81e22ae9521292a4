"""One process of `host.py`: checks one interpreter's peftrs against PEFT, or times one library, and tells it
as a line of JSON.

    python benches/host_side.py {check,peftrs,peft} [--only TEXT]

It uses only what peftrs and PEFT both have, so that an earlier peftrs can run it.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import platform
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from time import process_time
from typing import Any

import torch
from lifecycle import TARGETS, config, large, timed
from torch import Tensor, nn
from torch.nn import functional

import peftrs

warnings.filterwarnings("ignore")
BARE, BOTH = "forward", "forward and backward"
MIXED = "mixed batch of two"
OURS = ("LoRA", "two LoRAs", "DoRA", "OFT", MIXED)
PLAIN = {"LoRA": "plain LoRA", "two LoRAs": "two plain LoRAs"}
SIZES = ((1, 16), (4, 64))
"""Rows and width; a mixed batch has a row of each adapter at least."""
LIMIT = 1e-5
NAMES, FIRST = "import of two names", "first get_peft_model, 70B, lazy"
INJECT, UNCOLLECTED = "get_peft_model, 560 layers", "get_peft_model, 560 layers, gc off"
SWITCH, DISABLE = "set_adapter, 560 layers", "disable_adapter, 560 layers"
WIDE = (NAMES, FIRST, INJECT, UNCOLLECTED, SWITCH, DISABLE)


class Plain(nn.Module):
    """LoRA as anybody would write it."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.empty(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.base.weight, self.base.bias)
        return y + self.scaling * functional.linear(functional.linear(x, self.down), self.up)


class PlainTwo(Plain):
    """Two LoRAs as anybody would write them."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__(base, rank, scaling)
        self.down_b, self.up_b = (nn.Parameter(torch.empty_like(one)) for one in (self.down, self.up))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.base.weight, self.base.bias)
        y = y + self.scaling * functional.linear(functional.linear(x, self.down), self.up)
        return y + self.scaling * functional.linear(functional.linear(x, self.down_b), self.up_b)


def filled(model: nn.Module) -> list[Tensor]:
    """The trained parameters in the order of their names, with the same values on every side."""
    torch.manual_seed(1)
    named = dict(sorted((name, one) for name, one in model.named_parameters() if one.requires_grad))
    with torch.no_grad():
        for one in named.values():
            one.copy_(torch.randn(one.shape) / 10)
    return list(named.values())


def subject(kind: str, size: tuple[int, int], library: Any) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """One forward pass of what is timed, and the leaves that its backward pass reaches."""
    rows, width = max(size[0], 2 if kind == MIXED else 1), size[1]
    torch.manual_seed(0)
    base = nn.Linear(width, width).requires_grad_(False)
    x = torch.randn(rows, width).requires_grad_()
    if kind in ("frozen", *PLAIN.values()):
        module: nn.Module = (
            base if kind == "frozen" else (Plain if kind == PLAIN["LoRA"] else PlainTwo)(base, 8, 2.0)
        )
        return partial(module, x), [x, *filled(module)]
    if kind == "OFT":
        settings = partial(library.OFTConfig, oft_block_size=8, target_modules=["0"])
    else:
        settings = partial(
            library.LoraConfig, r=8, lora_alpha=16, use_dora=kind == "DoRA", target_modules=["0"]
        )
    model = library.get_peft_model(nn.Sequential(base), settings(), "a")
    if kind in ("two LoRAs", MIXED):
        model.add_adapter("b", settings())
        model.base_model.set_adapter(["a", "b"])
    leaves = [x, *filled(model)]
    if kind == MIXED:
        return partial(model.eval(), x, adapter_names=["a", "b"] * (rows // 2)), leaves
    return partial(model.train().base_model.model[0], x), leaves


def layers() -> nn.Module:
    """560 of them."""
    return nn.Sequential(
        *(nn.Sequential(OrderedDict((name, nn.Linear(16, 16)) for name in TARGETS)) for _ in range(80))
    )


def switchable(library: Any) -> Any:
    """The model of 560 layers with two adapters."""
    torch.manual_seed(0)
    model = library.get_peft_model(layers(), config(library, 8), "a")
    model.add_adapter("b", config(library, 8))
    model.base_model.set_adapter(["a", "b"])
    filled(model)
    return model


def there_and_back(kind: str, size: tuple[int, int], library: Any) -> list[Tensor]:
    """The output and the gradients."""
    forward, leaves = subject(kind, size, library)
    y = forward()
    torch.manual_seed(2)
    return [y, *torch.autograd.grad(y, leaves, torch.randn_like(y))]


def switched(library: Any) -> list[Tensor]:
    """Outputs and what is trained under either adapter, and the output under none."""
    model, x, found = switchable(library), torch.ones(1, 16), []
    for name in "ab":
        model.set_adapter(name)
        trained = dict(sorted((name, one.requires_grad) for name, one in model.named_parameters()))
        found += [model(x), torch.tensor([*trained.values()]).float()]
    with model.disable_adapter():
        return [*found, model(x)]


def check() -> float:
    """The largest ‖difference‖ / ‖PEFT's‖; ends the program where it is above the limit."""
    peft, largest = import_module("peft"), 0.0
    pairs = {"switching": (switched(peftrs), switched(peft))}
    for kind, size in itertools.product(OURS, SIZES):
        theirs = there_and_back(kind, size, peft)
        pairs[f"{kind}, {size}"] = there_and_back(kind, size, peftrs), theirs
        if kind in PLAIN:
            pairs[f"{PLAIN[kind]}, {size}"] = there_and_back(PLAIN[kind], size, None), theirs
    for name, pair in pairs.items():
        distance = max(((one - other).norm() / other.norm()).item() for one, other in zip(*pair, strict=True))
        largest = max(largest, distance)
        if not distance <= LIMIT:
            raise SystemExit(f"{name}: results differ from PEFT's by {distance:.1e}: nothing is timed")
    return largest


SWEEPS = {"peftrs": 5, "peft": 2}


def quickest(step: Callable[[], object], gradients: bool, bursts: int = 40, calls: int = 5) -> float:
    """Seconds a call: the quickest burst, of which the first few only warm up after another row's work.

    Of the same code on a busy machine, ten processes' medians of bursts of 200 calls had quartiles 24 to 42 %
    apart, their minima 1 to 6 %, those of 20 calls 1 to 5 % and of 5 calls 1 to 3 %. Single calls gain
    nothing on that, and each has the clock's 0.4 µs.
    """
    taken = []
    with torch.set_grad_enabled(gradients):
        for _ in range(bursts + bursts // 10):
            start = process_time()
            for _ in range(calls):
                step()
            taken.append((process_time() - start) / calls)
    return min(taken[bursts // 10 :])


def training(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    dy = torch.ones_like(forward())

    def step() -> None:
        forward().backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return step


def injected(library: Any, collected: bool) -> float:
    """Seconds of one injection, from a heap without garbage."""
    base = layers()
    gc.collect()
    if not collected:
        gc.disable()
    try:
        return timed(lambda: library.get_peft_model(base, config(library, 8))).processor / 1e3
    finally:
        gc.enable()


def wide_rows(library: Any) -> dict[str, Callable[[], float]]:
    model, turns = switchable(library), itertools.cycle("ba")

    def disable() -> None:
        with model.disable_adapter():
            pass

    return {
        INJECT: partial(injected, library, True),
        UNCOLLECTED: partial(injected, library, False),
        SWITCH: partial(quickest, lambda: model.set_adapter(next(turns)), True, 10, 2),
        DISABLE: partial(quickest, disable, True, 10, 2),
    }


def layer_rows(library: Any) -> dict[str, Callable[[], float]]:
    rows: dict[str, Callable[[], float]] = {}
    kinds = OURS if library.__name__ == "peft" else ("frozen", *PLAIN.values(), *OURS)
    for size, mode, kind in itertools.product(SIZES, (BARE, BOTH), kinds):
        forward, leaves = subject(kind, size, library)
        step = forward if mode == BARE else training(forward, leaves)
        rows[f"{kind}, {mode}, {size[1]} × {size[1]}"] = partial(quickest, step, mode == BOTH)
    return rows


def readings_of(name: str, only: str) -> dict[str, float]:
    """Seconds by row, of this process."""
    base = large(False)
    gc.collect()
    start = process_time()
    library = import_module(name)
    create, settings = library.get_peft_model, config(library)
    told = {NAMES: process_time() - start}
    told[FIRST] = timed(lambda: create(base, settings, low_cpu_mem_usage=True)).processor / 1e3
    rows = {row: take for row, take in {**layer_rows(library), **wide_rows(library)}.items() if only in row}
    for _ in range(SWEEPS[name]):
        for row, take in rows.items():  # so that a slow second is not one row's alone
            told[row] = min(told.get(row, float("inf")), take())
    return {row: taken for row, taken in told.items() if only in row}


def identity() -> dict[str, str]:
    """What this side runs; the hash is of the names and the text of peftrs' Python sources."""
    folder = Path(peftrs.__file__).parent
    parts = (str(one.relative_to(folder)).encode() + one.read_bytes() for one in sorted(folder.rglob("*.py")))
    versions = {one: version(one) for one in ("torch", "transformers", "peft")}
    return {
        "python": platform.python_version(),
        **versions,
        "sources": hashlib.sha256(b"".join(parts)).hexdigest()[:12],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=("check", *SWEEPS))
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    told = (
        {"largest": check(), **identity()}
        if arguments.work == "check"
        else readings_of(arguments.work, arguments.only)
    )
    print(json.dumps(told))


if __name__ == "__main__":
    main()
