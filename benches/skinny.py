"""The kernels of `lora_linear` one by one on a GPU: what each takes, and what share of the device's copy rate
that is.

    python benches/skinny.py [--quick] [--only NAME] [--runs N] [--output FILE]

The bytes are those of the large matrices that a pass must read and write; plain torch operations of the same
products stand beside it. Caches are flushed between runs.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from run import Row, measure, options, shown, write
from torch import Tensor

from peftrs.ops.lora_linear import reference, triton
from peftrs.ops.lora_linear.reference import Dropout

PASSES = ("low", "low, dropout", "up", "both", "across", "across, dropout")
DTYPES = (torch.float32, torch.bfloat16)
"""Of the factors: those that autocast trains, and those of a narrow model."""


def given(rows: int, width: int, out: int, rank: int, wide: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "x": (rows, width),
        "dy": (rows, out),
        "y": (rows, out),
        "u": (rows, rank),
        "down": (rank, width),
        "up": (out, rank),
    }
    return {
        name: torch.randn(shape, device="cuda").to(wide if name in ("u", "down", "up") else torch.bfloat16)
        for name, shape in shapes.items()
    }


def calls(name: str, at: dict[str, Tensor]) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """The kernel, the plain operations, and the bytes of the large matrices."""
    x, dy, y, u, down, up = at.values()
    narrow = x.dtype
    dropout = Dropout(3277, torch.tensor([1], device="cuda")) if "dropout" in name else None
    lower, upper, small = down.to(narrow), up.to(narrow), u.to(narrow)
    first = name.split(",")[0]
    if first == "low":
        return lambda: triton.low(x, down, dropout), lambda: reference.low(x, lower, dropout), x.nbytes
    if first == "up":
        return (
            lambda: triton._up(u, up.t(), None, y, 2.0, None),
            lambda: torch.mm(small, upper.t(), out=y),
            y.nbytes,
        )
    if first == "both":
        return lambda: triton._both(dy, up, u, 2.0), lambda: (dy @ upper, dy.t() @ small), dy.nbytes

    def plain() -> tuple[Tensor, Tensor]:
        kept = 1.0 if dropout is None else dropout.mask(x)
        return small.t() @ (x * kept if dropout else x), (small @ lower) * kept if dropout else small @ lower

    return lambda: triton._across(small, x, down, down.dtype, 2.0, dropout), plain, 2 * x.nbytes


def timed(run: Callable[[], Any], flushed: Tensor) -> float:
    flushed.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def make(name: str, case: tuple[Any, ...], side: str, quick: bool) -> Callable[[], object]:
    kernel, plain, _ = calls(name, given(*case))
    flushed = torch.empty(2**20 if quick else 2**28, dtype=torch.uint8, device="cuda")
    return lambda: timed(kernel if side == "kernel" else plain, flushed)


def copy_rate() -> float:
    """Bytes a millisecond, read and written."""
    one = torch.empty(2**28, dtype=torch.bfloat16, device="cuda")
    other, flushed = torch.empty_like(one), torch.empty(2**28, dtype=torch.uint8, device="cuda")
    return 2 * one.nbytes / min(timed(lambda: other.copy_(one), flushed) for _ in range(10))


def main() -> None:
    arguments = options(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: these kernels run on one only")
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}: copies {rate / 1e6:.0f} GB/s")
    shapes = [(8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096)]
    results = []
    for shape, rank, wide, name in itertools.product(
        shapes[:1] if arguments.quick else shapes, (16, 64, 128), DTYPES, PASSES
    ):
        case = (*shape, rank, wide)
        title = f"{name}, {' x '.join(map(str, shape))}, r={rank}, factors {str(wide).removeprefix('torch.')}"
        if arguments.only not in title or (name == "both" and rank > triton.JOINED):
            continue
        row = Row(title, partial(make, name, case), lambda _: None, ("kernel", "plain"))
        result = measure(row, arguments.quick, arguments.runs or (2 if arguments.quick else 7))
        result["of the copy rate"] = calls(name, given(*case))[2] / rate / result["medians"]["kernel"]
        results.append(result)
        print(f"{shown(result)}\n  {result['of the copy rate']:.0%} of the copy rate", flush=True)
    write(arguments.output, results)


if __name__ == "__main__":
    main()
