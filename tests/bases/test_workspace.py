"""Weights dequantized by rows into a tensor that is reused: the bits of the whole, and nobody left with
another's.
"""

from __future__ import annotations

import threading
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

import peftrs
from peftrs.bases import workspace
from peftrs.bases.quantized import Quantized
from peftrs.bases.resolve import resolve
from peftrs.core.layer import AdaptedLayer
from tests.bases import formats
from tests.ops.layers import layer, step

WIDTH, OUT = 128, 96
BY_ROWS = ["bnb-nf4", "bnb-nf4-double", "bnb-fp4", "bnb-int8", "torchao-int8"]
formats_by_rows = pytest.mark.parametrize("name", [one for one in BY_ROWS if find_spec(formats.library(one))])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "BLOCK", 10 * WIDTH)  # the last block has fewer rows
    monkeypatch.setattr(workspace, "_held", workspace._Held())
    monkeypatch.setattr("peftrs.ops.lora_linear.SMALL", -1)


def quantized(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return formats.FORMATS[name](nn.Linear(WIDTH, OUT, bias=False, dtype=dtype))


def weight(module: nn.Module, dtype: torch.dtype, *, reused: bool) -> Tensor:
    base = resolve(module)
    assert isinstance(base, Quantized)
    with torch.no_grad():
        return base.multiplied(module, dtype, reused=reused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@formats_by_rows
def test_rows_have_the_bits_that_they_have_in_the_whole(name: str, dtype: torch.dtype) -> None:
    first, second = quantized(name, 0, dtype), quantized(name, 1, dtype)
    filled = weight(first, dtype, reused=True)
    whole = weight(first, dtype, reused=False)
    assert filled.shape == (OUT, WIDTH)
    assert filled.dtype == whole.dtype
    assert torch.equal(filled, whole)
    assert weight(second, dtype, reused=True).data_ptr() == filled.data_ptr()
    assert torch.equal(filled, weight(second, dtype, reused=False))
    assert not torch.equal(filled, whole)


def test_a_larger_weight_takes_a_larger_place_and_a_smaller_one_a_part_of_it() -> None:
    pieces = {size: torch.randn(size, WIDTH) for size in (40, 60, 20)}
    places = {}
    for size, piece in pieces.items():
        found = workspace.filled(
            lambda start, stop, into, piece=piece: into.copy_(piece[start:stop]), piece.shape, torch.float32
        )
        assert torch.equal(found, piece)
        places[size] = found.untyped_storage().data_ptr()
    assert places[40] != places[60] == places[20]


def test_each_thread_has_its_own() -> None:
    piece, places = torch.randn(40, WIDTH), []

    def run() -> None:
        places.append(
            workspace.filled(
                lambda start, stop, into: into.copy_(piece[start:stop]), piece.shape, torch.float32
            )
        )

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    run()
    assert len({one.data_ptr() for one in places}) == 3


def test_a_weight_of_one_block_has_no_place_of_its_own() -> None:
    piece = torch.randn(10, WIDTH)
    found = workspace.filled(
        lambda start, stop, into: into.copy_(piece[start:stop]), piece.shape, torch.float32
    )
    assert torch.equal(found, piece)
    assert not workspace._held.tensors


@formats_by_rows
def test_what_inference_made_training_can_use(name: str) -> None:
    module = layer(peftrs, torch.float32, WIDTH, OUT, base=quantized(name), r=4)
    x = torch.randn(6, WIDTH)
    with torch.inference_mode(), torch.device("meta"):
        y = module(x)
    assert workspace._held.tensors
    assert torch.equal(step(module, x), y)


@formats_by_rows
def test_layers_that_share_it_train_as_if_each_had_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for block in (10 * WIDTH, 2**30):
        monkeypatch.setattr(workspace, "BLOCK", block)
        modules = [
            layer(peftrs, torch.float32, WIDTH, OUT, base=quantized(name, seed), r=4) for seed in range(2)
        ]
        x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (modules[0](x) * modules[1](x)).sum().backward()
        grads = [one.grad for module in modules for one in module.parameters() if one.grad is not None]
        outcomes.append([x.grad, *grads])
        assert len(outcomes[-1]) == 5
    assert workspace._held.tensors
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


@formats_by_rows
def test_gradients_of_gradients_keep_their_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for block in (10 * WIDTH, 2**30):
        monkeypatch.setattr(workspace, "BLOCK", block)
        module = layer(peftrs, torch.float32, WIDTH, OUT, base=quantized(name), r=4)
        other = layer(peftrs, torch.float32, WIDTH, OUT, base=quantized(name, 1), r=4)
        assert isinstance(module, AdaptedLayer)
        x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (first,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        step(other, torch.randn(6, WIDTH))  # dequantizes another weight in between
        outcomes.append(torch.autograd.grad(first.square().sum(), [x, module.lora_B["default"].weight]))
    assert all(torch.equal(one, two) for one, two in zip(*outcomes, strict=True))
