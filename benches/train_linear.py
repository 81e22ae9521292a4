"""One linear layer in training, forward and backward: frozen, the floor of plain operations, PEFT, Unsloth's
formulas, peftrs.

    python benches/train_linear.py [--quick] [--only NAME] [--runs N] [--threads N] [--output FILE]

"host" is a layer so small that only the calls count; ratios are of whole times. There, "module" is the
floor's operations in an `nn.Module` as anybody would write it: what calling a module and finding its
parameters cost beside them. Outputs and gradients are checked against float64 before anything is timed. On a
GPU the caches are flushed between runs, and the copy rate and the frozen product's rate are printed, so that
the limit stands beside the readings. The Unsloth side is its published formulas (base first, `addmm_` after,
`x·Aᵀ` made again in the backward pass), written for this bench.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from run import Row, options, run
from torch import Tensor, nn
from torch.nn import functional

warnings.filterwarnings("ignore")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BOTH, FORWARD, BARE = "forward and backward", "forward", "forward without gradients"


class BaseFirst(torch.autograd.Function):
    """The order that Unsloth computes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scaling = scaling
        return (x @ weight.t()).addmm_(x @ down.to(x.dtype).t(), up.to(x.dtype).t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        dy, lower, upper = gradients[0], down.to(x.dtype), up.to(x.dtype)
        d_down = ctx.scaling * (dy @ upper).t() @ x
        d_up = ctx.scaling * dy.t() @ (x @ lower.t())
        dx = (dy @ weight).addmm_(dy @ upper, lower, alpha=ctx.scaling)
        return dx, None, d_down.to(down.dtype), d_up.to(up.dtype), None


class Plain(nn.Module):
    """The floor's operations as a module."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.down, self.up, self.scaling = base, nn.Parameter(down), nn.Parameter(up), scaling

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.base.weight)
        return torch.addmm(y, functional.linear(x, self.down), self.up.t(), alpha=self.scaling)


Setup = tuple[Callable[[], Tensor], Tensor, list[Tensor]]


def setup(
    name: str, rows: int, width: int, out: int, dtype: torch.dtype, dropout: float, mode: str = BOTH
) -> Setup:
    """The forward pass of one side, the gradient that comes back, and the leaves."""
    torch.manual_seed(0)
    base = nn.Linear(width, out, bias=False).to(DEVICE, dtype).requires_grad_(False)
    x = torch.randn(rows, width).to(DEVICE, dtype).requires_grad_(mode == BOTH)
    dy = torch.randn(rows, out).to(DEVICE, dtype)
    rank, scaling = min(16, width), 2.0
    factors = [(torch.randn(rank, width) / width**0.5), torch.randn(out, rank) / 10]
    if name == "frozen":
        return lambda: base(x), dy, [x]
    if name in ("peft", "peftrs"):
        library = import_module(name)
        config = library.LoraConfig(
            target_modules=["0"], r=rank, lora_alpha=scaling * rank, lora_dropout=dropout
        )
        layer = library.get_peft_model(nn.Sequential(base), config).base_model.model[0].train()
        leaves = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        with torch.no_grad():
            for leaf, value in zip(leaves, factors, strict=True):
                leaf.copy_(value)
        return lambda: layer(x), dy, [x, *leaves]
    if name == "module":
        module = Plain(base, *factors, scaling)
        return lambda: module(x), dy, [x, module.down, module.up]
    wide = dtype if name == "floor" else torch.float32  # plain operations take one dtype
    down, up = (factor.to(DEVICE, wide).requires_grad_() for factor in factors)
    weight = base.weight
    if name == "floor":
        return (
            lambda: torch.addmm(
                functional.linear(x, weight), functional.linear(x, down), up.t(), alpha=scaling
            ),
            dy,
            [x, down, up],
        )
    return lambda: BaseFirst.apply(x, weight, down, up, scaling), dy, [x, down, up]


def work(case: tuple[Any, ...], repeats: int, name: str, quick: bool) -> Callable[[], object]:
    forward, dy, leaves = setup(name, *(sized(case) if quick else case))
    flushed = torch.empty(2**28, dtype=torch.uint8, device=DEVICE) if GPU else None
    mode = case[-1]

    def once() -> float:
        if flushed is not None:
            flushed.zero_()
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.set_grad_enabled(mode != BARE):
            for _ in range(repeats):
                y = forward()
                if mode == BOTH:
                    y.backward(dy)
                    for leaf in leaves:
                        leaf.grad = None
        if GPU:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 / repeats

    return once


def sized(case: tuple[Any, ...]) -> tuple[Any, ...]:
    rows, width, out, *rest = case
    return min(rows, 32), min(width, 64), min(out, 64), *rest


def check(case: tuple[Any, ...], quick: bool) -> None:
    case = sized(case) if quick or not GPU else case
    rows, width, out, dtype, dropout, _ = case
    if dropout:
        return  # every side draws a mask of its own
    for name in ("peftrs", "peft", "unsloth", "floor", *(["module"] if dtype is torch.float32 else [])):
        forward, dy, leaves = setup(name, rows, width, out, dtype, dropout)
        y = forward()
        found = [y, *torch.autograd.grad(y, leaves, dy)]
        x, down, up = (leaf.detach().double().requires_grad_() for leaf in leaves)
        torch.manual_seed(0)
        weight = nn.Linear(width, out, bias=False).to(dtype).weight.detach().double().to(DEVICE)
        exact = x @ weight.t() + 2.0 * (x @ down.t()) @ up.t()
        for one, other in zip(
            found, [exact, *torch.autograd.grad(exact, [x, down, up], dy.double())], strict=True
        ):
            error = ((one.double() - other).norm() / other.norm()).item()
            if not error <= (1e-5 if dtype is torch.float32 else 2e-2):
                raise SystemExit(f"{name} differs from float64 by {error:.1e}: nothing is timed")


def limits() -> None:
    """The device's copy rate and its rate of a large bfloat16 product."""
    one = torch.empty(2**28 if GPU else 2**24, dtype=torch.bfloat16, device=DEVICE)
    a = torch.randn(8192 if GPU else 1024, 4096 if GPU else 1024, device=DEVICE).bfloat16()
    for name, repeated, amount, unit in (
        ("copy", one.clone, 2 * one.nbytes, "GB/s"),
        ("product", lambda: a @ a.t(), 2 * a.shape[0] ** 2 * a.shape[1], "GFLOP/s"),
    ):
        repeated()
        if GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            repeated()
        if GPU:
            torch.cuda.synchronize()
        print(f"{name}: {amount * 10 / (time.perf_counter() - start) / 1e9:.0f} {unit}")


HOST = [
    (1, 16, 16, torch.float32, dropout, mode) for mode in (FORWARD, BARE, BOTH) for dropout in (0.0, 0.05)
]
SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096)] if GPU else [(576, 576), (576, 1536), (1536, 576)]
TOKENS = 8192 if GPU else 512
CASES = [
    (TOKENS, *shape, dtype, dropout, BOTH)
    for shape in SHAPES
    for dtype in (torch.float32, torch.bfloat16)
    for dropout in (0.0, 0.05)
]


def row(name: str, case: tuple[Any, ...], repeats: int) -> Row:
    sides = ("peftrs", "frozen", "floor", "unsloth", "peft") if not case[4] else ("peftrs", "frozen", "peft")
    if name.startswith("host") and not case[4]:
        sides = (*sides[:3], "module", *sides[3:])
    return Row(name, partial(work, case, repeats), partial(check, case), sides)


ROWS = [row(f"host, {case[-1]}, dropout {case[4]}", case, 300) for case in HOST]
ROWS += [
    row(f"{case[0]} x {case[1]} -> {case[2]}, {case[3]}, dropout {case[4]}", case, 1 if GPU else 3)
    for case in CASES
]


def main(rows: Sequence[Row], description: str | None) -> None:
    """Measures the rows that the command line asks for, beside what the device can do."""
    parser = options(description)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    limits()
    run(rows, arguments, arguments.threads)


if __name__ == "__main__":
    main(ROWS, __doc__)
