"""The seven linear layers of a decoder's layer in training: frozen, PEFT, Unsloth's formulas, peftrs.

    python benches/train_layer.py [--quick] [--only NAME] [--runs N] [--threads N] [--output FILE]

q, k and v read one `x`, gate and up another, as in a model; norms, attention's products and the activation
are left out, so that the ratios are those of the linear layers alone. LoRA r=16 on all seven, forward and
backward. The output and the gradient of the input are checked against float64 before anything is timed. On a
CPU the layer is SmolLM2-135M's, on a GPU Llama-3-8B's.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from run import Row
from torch import Tensor, nn
from train_linear import DEVICE, GPU, BaseFirst, main

warnings.filterwarnings("ignore")
RANK, SCALING = 16, 2.0
WIDTH, NARROW, INNER, TOKENS = (4096, 1024, 14336, 8192) if GPU else (576, 192, 1536, 512)
SHAPES = {
    "q_proj": (WIDTH, WIDTH), "k_proj": (WIDTH, NARROW), "v_proj": (WIDTH, NARROW), "o_proj": (WIDTH, WIDTH),
    "gate_proj": (WIDTH, INNER), "up_proj": (WIDTH, INNER), "down_proj": (INNER, WIDTH),
}  # fmt: skip


class Linears(nn.Module):
    """The linear layers of a decoder's layer, joined by what costs least."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (width, out) in shapes.items():
            setattr(self, name, nn.Linear(width, out, bias=False).requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        keys, values = self.k_proj(x), self.v_proj(x)
        queries = self.q_proj(x)
        repeated = queries.shape[-1] // keys.shape[-1]
        x = x + self.o_proj(queries + torch.cat([keys + values] * repeated, -1))
        return x + self.down_proj(self.gate_proj(x) + self.up_proj(x))


class Unsloth(nn.Module):
    """One linear layer by Unsloth's formulas."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor) -> Tensor:
        y = BaseFirst.apply(x.flatten(0, -2), self.base.weight, self.down, self.up, SCALING)
        return y.view(*x.shape[:-1], -1)


def sized(quick: bool) -> tuple[dict[str, tuple[int, int]], int]:
    if not quick:
        return SHAPES, TOKENS
    small = {WIDTH: 48, NARROW: 16, INNER: 64}
    return {name: (small[width], small[out]) for name, (width, out) in SHAPES.items()}, 8


def factors(shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return {
        name: (torch.randn(RANK, width) / width**0.5, torch.randn(out, RANK) / 50)
        for name, (width, out) in shapes.items()
    }


def layer(name: str, dtype: torch.dtype, dropout: float, quick: bool) -> nn.Module:
    shapes, _ = sized(quick)
    model: nn.Module = Linears(shapes).to(DEVICE, dtype)
    given = {key: (down.to(DEVICE), up.to(DEVICE)) for key, (down, up) in factors(shapes).items()}
    if name == "unsloth":
        for key, (down, up) in given.items():
            setattr(model, key, Unsloth(getattr(model, key), down, up))
    elif name != "frozen":
        library = import_module(name)
        settings = {"r": RANK, "lora_alpha": SCALING * RANK, "lora_dropout": dropout}
        model = library.get_peft_model(
            model, library.LoraConfig(target_modules=list(shapes), **settings)
        ).base_model.model
        with torch.no_grad():
            for key, (down, up) in given.items():
                getattr(model, key).lora_A["default"].weight.copy_(down)
                getattr(model, key).lora_B["default"].weight.copy_(up)
    return model.train()


def inputs(dtype: torch.dtype, quick: bool) -> tuple[Tensor, Tensor]:
    shapes, rows = sized(quick)
    torch.manual_seed(2)
    x, dy = torch.randn(2, 1, rows, shapes["q_proj"][0]).to(DEVICE, dtype)
    return x.requires_grad_(), dy


def work(dtype: torch.dtype, dropout: float, name: str, quick: bool) -> Callable[[], object]:
    model, (x, dy) = layer(name, dtype, dropout, quick), inputs(dtype, quick)
    flushed = torch.empty(2**28, dtype=torch.uint8, device=DEVICE) if GPU else None

    def once() -> float:
        if flushed is not None:
            flushed.zero_()
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(x).backward(dy)
        if GPU:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        x.grad = None
        model.zero_grad()
        return elapsed * 1e3

    return once


def check(dtype: torch.dtype, dropout: float, quick: bool) -> None:
    if dropout:
        return  # every side draws masks of its own
    shapes, _ = sized(quick)
    x, dy = (one.detach().double() for one in inputs(dtype, quick))
    exact = Linears(shapes).to(DEVICE, dtype).double()
    with torch.no_grad():
        for name, (down, up) in factors(shapes).items():
            getattr(exact, name).weight += SCALING * (up.double() @ down.double()).to(DEVICE)
    y = exact(x.requires_grad_())
    wanted = [y, *torch.autograd.grad(y, x, dy)]
    for name in ("peftrs", "peft", "unsloth"):
        narrow, _ = inputs(dtype, quick)
        y = layer(name, dtype, 0.0, quick)(narrow)
        for one, other in zip([y, *torch.autograd.grad(y, narrow, dy.to(dtype))], wanted, strict=True):
            error = ((one.double() - other).norm() / other.norm()).item()
            if not error <= (1e-5 if dtype is torch.float32 else 3e-2):
                raise SystemExit(f"{name} differs from float64 by {error:.1e}: nothing is timed")


CASES: list[tuple[Any, ...]] = [
    (dtype, dropout) for dtype in (torch.float32, torch.bfloat16) for dropout in (0.0, 0.05)
]
ROWS = [
    Row(
        f"seven layers, {dtype}, dropout {dropout}",
        partial(work, dtype, dropout),
        partial(check, dtype, dropout),
        ("peftrs", "frozen", "peft") if dropout else ("peftrs", "frozen", "unsloth", "peft"),
    )
    for dtype, dropout in CASES
]


if __name__ == "__main__":
    main(ROWS, __doc__)
