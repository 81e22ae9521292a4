"""One quantized linear layer in training, LoRA r=16 over it, forward and backward: peftrs as one operation
and composed, and PEFT.

    python benches/train_quantized.py [--quick] [--only NAME] [--runs N] [--threads N] [--output FILE]

Outputs and gradients are held against the composed layer's before anything is timed. Also printed: the bytes
that the forward pass keeps for the backward pass, of the bytes of the input in bfloat16.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from run import Row, options, run
from torch import Tensor, nn

import peftrs.ops
from tests.bases import formats
from tests.ops.accounting import Ledger

warnings.filterwarnings("ignore")
SIDES = ("peftrs", "composed", "peft")
SHAPES = [(512, 576, 1536), (512, 1536, 576), (512, 2048, 2048), (512, 4096, 4096)]
Step, Shape = Callable[[], Tensor], tuple[int, int, int]


def quantized(base: str, dense: nn.Linear, dtype: torch.dtype) -> nn.Module:
    if base == "bnb-nf4":
        return formats.four_bit("nf4", True, dtype)(dense)
    return formats.hqq(4, dtype)(dense) if base == "hqq-4" else formats.FORMATS[base](dense)


def setup(
    base: str, shape: Shape, dtype: torch.dtype, dropout: float, name: str
) -> tuple[Step, Tensor, list[Tensor]]:
    """The forward pass of one side, the gradient that comes back, and the leaves."""
    rows, width, out = shape
    torch.manual_seed(0)
    library = import_module("peft" if name == "peft" else "peftrs")
    frozen = quantized(base, nn.Linear(width, out, bias=False).to(dtype), dtype)
    config = library.LoraConfig(target_modules=["0"], r=16, lora_alpha=32, lora_dropout=dropout)
    layer = library.get_peft_model(nn.Sequential(frozen), config).base_model.model[0].train()
    leaves = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    torch.manual_seed(1)
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn(leaf.shape) / leaf.shape[1] ** 0.5)
    x, dy = torch.randn(rows, width).to(dtype).requires_grad_(), torch.randn(rows, out).to(dtype)

    def forward() -> Tensor:
        with peftrs.ops.fused(name != "composed"):
            return layer(x)

    return forward, dy, [x, *leaves]


def small(shape: Shape, quick: bool) -> Shape:
    return (8, 64, 64) if quick else shape


def work(
    base: str, shape: Shape, dtype: torch.dtype, dropout: float, name: str, quick: bool
) -> Callable[[], object]:
    forward, dy, leaves = setup(base, small(shape, quick), dtype, dropout, name)
    forward()  # takes what is kept from call to call
    with Ledger() as ledger:
        y = forward()
    kept = (ledger.alive() - y.nbytes) / (leaves[0].numel() * 2)
    print(f"  {name} keeps {kept:.3f} of the input")
    y.backward(dy)

    def once() -> float:
        start = time.perf_counter()
        forward().backward(dy)
        elapsed = time.perf_counter() - start
        for leaf in leaves:
            leaf.grad = None
        return elapsed * 1e3

    return once


def check(base: str, shape: Shape, dtype: torch.dtype, dropout: float, quick: bool) -> None:
    if dropout:
        return  # every side draws a mask of its own
    found = {}
    for name in SIDES:
        forward, dy, leaves = setup(base, small(shape, quick), dtype, dropout, name)
        y = forward()
        found[name] = [y, *torch.autograd.grad(y, leaves, dy)]
    for name in ("peftrs", "peft"):
        for one, other in zip(found[name], found["composed"], strict=True):
            error = ((one.double() - other.double()).norm() / other.double().norm()).item()
            if not error <= (1e-5 if dtype is torch.float32 else 2e-2):
                raise SystemExit(f"{name} differs by {error:.1e}: nothing is timed")


ROWS = [
    Row(
        f"{base}, {shape[0]} x {shape[1]} -> {shape[2]}, {dtype}, dropout {dropout}",
        partial(work, base, shape, dtype, dropout),
        partial(check, base, shape, dtype, dropout),
        SIDES,
    )
    for base in ("bnb-nf4", "bnb-int8", "hqq-4", "torchao-int8")
    for shape in SHAPES
    for dtype in (torch.float32, torch.bfloat16)
    for dropout in (0.0, 0.05)
]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run(ROWS, arguments, arguments.threads)


if __name__ == "__main__":
    main()
