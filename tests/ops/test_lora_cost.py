"""What an adapted linear layer keeps and moves beyond the frozen one, counted, beside PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import peftrs
from tests.ops.accounting import Ledger, count
from tests.ops.layers import layer, step

Record = Callable[[str, object], None]
BUDGET = 0.02  # of the bytes of x in a two-byte dtype, M·K·2
MODES = [
    (torch.bfloat16, True),
    (torch.bfloat16, False),
    (torch.float16, False),
    (torch.float32, False),
    (torch.float32, True),
]
modes = pytest.mark.parametrize(("dtype", "autocast"), MODES, ids=lambda value: str(value))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@modes
def test_storage_kept_for_the_backward_pass_is_a_fiftieth_of_the_input(
    dtype: torch.dtype, autocast: bool, dropout: float, record_testsuite_property: Record
) -> None:
    rows = width = 4096  # what is kept does not depend on the number of outputs, but for B's narrow copy

    def kept(library: Any) -> tuple[float, float]:
        module = layer(library, dtype, width, 64, lora_dropout=dropout)
        x = torch.randn(rows, width).to(dtype).requires_grad_()
        saved: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda one: saved.append(one) or one, lambda one: one
        )
        with Ledger() as ledger, hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        given = {one.untyped_storage()._cdata for one in (x, *module.parameters())}
        reported = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in saved}
        told = sum(size for storage, size in reported.items() if storage not in given)
        return float(ledger.alive() - y.untyped_storage().nbytes()), float(told)

    alive, told = (
        (ours - frozen) / (rows * width * 2) for ours, frozen in zip(kept(peftrs), kept(None), strict=True)
    )
    record_testsuite_property(
        f"kept of M·K·2, {dtype}, autocast {autocast}, dropout {dropout}", f"{alive:.4f}, told {told:.4f}"
    )
    assert 0 < alive <= BUDGET
    assert told <= BUDGET


def test_under_autocast_a_third_of_the_bytes_move(record_testsuite_property: Record) -> None:
    extra = {}
    for library in (None, peftrs, peft):
        module = layer(library, torch.bfloat16, 1024, 1024)
        x = torch.randn(1024, 1024).bfloat16().requires_grad_()
        extra[library] = count(lambda module=module, x=x: step(module, x, autocast=True)).bytes
    ratio = (extra[peftrs] - extra[None]) / (extra[peft] - extra[None])
    record_testsuite_property("bytes moved of PEFT's", f"{ratio:.3f}")
    assert 0 < ratio <= 0.35


@modes
def test_fewer_bytes_move_in_every_mode(dtype: torch.dtype, autocast: bool) -> None:
    moved = {}
    for library in (None, peftrs, peft):
        module = layer(library, dtype, 256, 256, lora_dropout=0.05)
        x = torch.randn(256, 256).to(dtype).requires_grad_()
        moved[library] = count(lambda module=module, x=x: step(module, x, autocast=autocast)).bytes
    assert moved[peftrs] - moved[None] < moved[peft] - moved[None]


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_fewer_operations_run(dtype: torch.dtype, autocast: bool, record_testsuite_property: Record) -> None:
    run = {}
    for library in (peftrs, peft):
        module = layer(library, dtype, 16, 16)
        x = torch.randn(4, 16).to(dtype).requires_grad_()
        run[library] = count(lambda module=module, x=x: step(module, x, autocast=autocast)).operations
    record_testsuite_property(f"operations, {dtype}, autocast {autocast}", f"{run[peftrs]}, PEFT {run[peft]}")
    assert run[peftrs] < run[peft]
