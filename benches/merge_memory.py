"""Merging in memory: Linear layers, LoRA, the same weights in both libraries.

    python benches/merge_memory.py [--quick] [--only NAME] [--runs N] [--output FILE]

Rows time `merge_and_unload` alone, of one layer and of several, and `merge_adapter` followed by
`unmerge_adapter`, on one thread and on two. Then come, for each dtype of base and adapter, the share of
weights that are off the exact W + s·B·A rounded once (PEFT also with `safe_merge`), the bytes that
`merge_adapter` keeps for each weight, and the memory that `merge_and_unload` takes on top of a model of four
layers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from run import Row, Taken, measure, options, shown, write
from torch import Tensor, nn

warnings.filterwarnings("ignore")

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@lru_cache(maxsize=1)
def tensors(shape: tuple[int, int], rank: int, base: str, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
    """W, A and B, of such sizes that the change is a tenth of the weight."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    weight = draw(shape) * 0.02
    up, down = draw(shape[0], rank) * 0.002 / rank**0.5, draw(rank, shape[1])
    return weight.to(DTYPES[base]), down.to(DTYPES[adapter]), up.to(DTYPES[adapter])


def model(used: Any, shape: tuple[int, int], rank: int, base: str, adapter: str, layers: int = 1) -> Any:
    weight, down, up = tensors(shape, rank, base, adapter)
    bare = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(layers)))
    for layer in bare:
        layer.in_features, layer.out_features = shape[1], shape[0]
        layer.weight = nn.Parameter(weight.clone())
    config = used.LoraConfig(r=rank, lora_alpha=rank, target_modules=[str(index) for index in range(layers)])
    adapted = used.get_peft_model(bare, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for layer in adapted.base_model.model:
            for held, value in ((layer.lora_A, down), (layer.lora_B, up)):
                held["default"].weight = nn.Parameter(value.clone())
    return adapted


SIDES = ("peftrs", "peftrs, 2 threads", "peft", "peft, 2 threads")
SETTLE = 0.05
"""Seconds between making a model and merging it."""
MANY = 8
"""Layers of the model that has more than one."""
PAIRS = (("bf16", "f32"), ("bf16", "bf16"), ("f16", "f32"), ("f32", "f32"))


def library(side: str) -> Any:
    """The library of a side, which then works on as many threads as the side says."""
    torch.set_num_threads(2 if side.endswith("2 threads") else 1)
    return import_module(side.partition(",")[0])


def unload(side: str, quick: bool, **case: Any) -> Callable[[], Taken]:
    def work() -> Taken:
        adapted = model(library(side), **case)
        # The threads with which torch copied the weights spin for a few milliseconds, and would take a
        # processor from the merge. This one stays awake, so that it starts as warm as after any other work.
        ready = time.perf_counter() + SETTLE
        while time.perf_counter() < ready:
            pass
        before, start = time.process_time(), time.perf_counter()
        adapted.merge_and_unload()
        return Taken((time.perf_counter() - start) * 1e3, (time.process_time() - before) * 1e3)

    return work


def cycle(side: str, quick: bool, **case: Any) -> Callable[[], None]:
    adapted = model(library(side), **case)

    def work() -> None:
        library(side)
        adapted.merge_adapter()
        adapted.unmerge_adapter()

    return work


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values rounded to the nearest of the dtype, without the detour over float32 that torch
    takes.
    """
    kind = torch.finfo(dtype)
    least = torch.frexp(torch.tensor(kind.smallest_normal)).exponent
    unit = torch.exp2((torch.frexp(values).exponent.maximum(least) - 1).double()) * kind.eps
    return ((values / unit).round() * unit).to(dtype)


def off(used: Any, safe: bool, **case: Any) -> float:
    """The share of weights, in percent, that are not the exact sum rounded once."""
    weight, down, up = tensors(**case)
    exact = rounded(weight.double() + up.double() @ down.double(), weight.dtype)
    merged = next(model(used, **case).merge_and_unload(safe_merge=safe).parameters())
    return 100 * float((merged != exact).double().mean())


def check(quick: bool, **case: Any) -> None:
    """Ends the program unless peftrs's weights are right; PEFT's may be further off."""
    if (share := off(import_module("peftrs"), False, **case)) > 0.005:
        raise SystemExit(f"{share:.4f} % of weights are off: nothing is timed")


def rows(quick: bool) -> list[Row]:
    shapes = [(256, 256)] if quick else [(4096, 4096), (4096, 14336)]
    made = []
    for shape in shapes:
        for rank in (16,) if quick else (16, 64):
            for base, adapter in PAIRS:
                case = {"shape": shape, "rank": rank, "base": base, "adapter": adapter}
                what = f"{shape[0]}x{shape[1]} r={rank} {base} base {adapter} adapter"
                checked = partial(check, **case)
                made.append(Row(f"merge_and_unload {what}", partial(unload, **case), checked, SIDES))
                made.append(Row(f"merge and unmerge {what}", partial(cycle, **case), checked, SIDES))
                if (shape, base, adapter) == (shapes[0], *PAIRS[0]):
                    many = partial(unload, layers=MANY, **case)
                    made.append(Row(f"merge_and_unload, {MANY} layers of {what}", many, checked, SIDES))
    return made


def numbers(quick: bool) -> list[dict[str, Any]]:
    shape, peftrs, peft = (
        (256, 256) if quick else (1024, 1024),
        import_module("peftrs"),
        import_module("peft"),
    )
    table = []
    for base in DTYPES:
        for adapter in DTYPES:
            case = {"shape": shape, "rank": 16, "base": base, "adapter": adapter}
            shares = {
                "peftrs": off(peftrs, False, **case),
                "peft": off(peft, False, **case),
                "peft safe": off(peft, True, **case),
            }
            table.append({"base": base, "adapter": adapter, "percent off": shares})
    return table


def kept(quick: bool) -> list[dict[str, Any]]:
    table = []
    for rank in (16, 64):
        for base in DTYPES:
            case = {
                "shape": (512, 512) if quick else (4096, 4096),
                "rank": rank,
                "base": base,
                "adapter": "f32",
            }
            adapted = model(import_module("peftrs"), **case)
            adapted.merge_adapter()
            ledger = adapted.base_model.model[0].ledger
            table.append(
                {**case, "bytes kept a weight": ledger.bytes / (case["shape"][0] * case["shape"][1])}
            )
    return table


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def extra(name: str, shape: tuple[int, int], rank: int, base: str) -> int:
    """The bytes by which resident memory grows at most while four layers are merged; to be run in a process
    of its own.
    """
    used = library(name)
    model(used, (64, 64), rank, base, "f32").merge_and_unload()
    adapted = model(used, shape, rank, base, "f32", layers=4)
    tensors.cache_clear()
    # Resets the peak, so that it is that of the merge alone.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    adapted.merge_and_unload()
    return resident("VmHWM") - before


def memory(quick: bool) -> list[dict[str, Any]]:
    table = []
    for rank in (16,) if quick else (16, 64):
        for base in ("bf16",) if quick else ("bf16", "f32"):
            shape = (512, 512) if quick else (4096, 14336)
            case: dict[str, Any] = {"shape": shape, "rank": rank, "base": base}
            for name in ("peftrs", "peft"):
                program = (
                    f"import merge_memory; print(merge_memory.extra({name!r}, {shape!r}, {rank!r}, {base!r}))"
                )
                command = [sys.executable, "-c", program]
                done = subprocess.run(
                    command, capture_output=True, check=True, text=True, cwd=Path(__file__).parent
                )
                case[f"{name} extra MB"] = int(done.stdout) / 1e6
            table.append(case)
    return table


def main() -> None:
    arguments = options(__doc__).parse_args()
    results = []
    for row in rows(arguments.quick):
        if arguments.only in row.name:
            results.append(measure(row, arguments.quick, arguments.runs or (2 if arguments.quick else 5)))
            print(shown(results[-1]), flush=True)
    for table in (numbers, kept, memory):
        if not arguments.only or arguments.only in table.__name__:
            for line in table(arguments.quick):
                results.append({"row": table.__name__, **line})
                print(json.dumps(results[-1]), flush=True)
    write(arguments.output, results, 2)


if __name__ == "__main__":
    main()
