"""The fused operation computes what it says, its gradients too, closer than PEFT, and its dropout is one mask
throughout.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peftrs
from peftrs.ops import lora_linear as package
from peftrs.ops.lora_linear import Unstored, lora_linear
from tests.laws.cases import distance, seeds
from tests.ops.layers import layer, step, tensors
from tests.ops.masks import assert_fair

UNIT = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=["large", "small"], scope="module")
def size(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small inputs run torch's own operations, large ones ours: here either takes all."""
    before, package.SMALL = package.SMALL, 2**62 if request.param == "small" else -1
    yield
    package.SMALL = before


@settings(max_examples=8)
@given(
    seed=seeds, sizes=st.tuples(*[st.integers(1, 7)] * 4), bias=st.booleans(), dropout=st.sampled_from([0.0,
    0.4]),
    lead=st.sampled_from([(), (2,), (2, 3)]),
)  # fmt: skip
def test_first_and_second_derivatives_are_those_of_the_formula(seed, sizes, bias, dropout, lead) -> None:
    torch.manual_seed(seed)
    rows, width, out, rank = sizes
    weight = torch.randn(out, width, dtype=torch.float64)
    shapes = [(*lead, rows, width), (rank, width), (out, rank), *([(out,)] if bias else [])]
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(x: Tensor, down: Tensor, up: Tensor, shift: Tensor | None = None) -> Tensor:
        torch.manual_seed(seed)  # one mask for all evaluations
        y = lora_linear(x, weight, shift, down, up, -0.7, dropout)
        assert y is not None
        return y

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_come_out_with_and_without_gradients(
    dtype: torch.dtype, factors: torch.dtype, autocast: bool
) -> None:
    adapted = layer(peftrs, dtype, 48, 20, bias=True, lora_alpha=11, lora_bias=True).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(factors)
    x = torch.randn(3, 5, 48, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = adapted(x)
        assert y.requires_grad
        with torch.no_grad():
            assert torch.equal(adapted(x), y)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", list(UNIT))
def test_output_and_gradients_lie_at_the_rounding_of_the_dtype(dtype: torch.dtype, transposed: bool) -> None:
    rows, width, out, rank, scaling = 33, 70, 45, 5, 1.5
    x, dy = torch.randn(rows, width).to(dtype), torch.randn(rows, out).to(dtype)
    weight = (torch.randn(width, out).mT if transposed else torch.randn(out, width)).to(dtype)
    factors = torch.randn(rank, width) / 8, torch.randn(out, rank) / 8
    for wide in (torch.float32, dtype):
        given = [one.clone().requires_grad_() for one in (x, factors[0].to(wide), factors[1].to(wide))]
        exact = [one.detach().double().requires_grad_() for one in given]
        y = lora_linear(given[0], weight, None, *given[1:], scaling)
        assert y is not None
        expected = exact[0] @ weight.double().mT + scaling * exact[0] @ exact[1].mT @ exact[2].mT
        found = torch.autograd.grad(y, given, dy)
        wanted = torch.autograd.grad(expected, exact, dy.double())
        assert y.dtype == dtype
        assert distance(y, expected) < 2 * UNIT[dtype]
        for one, other, held in zip(found, wanted, given, strict=True):
            assert one.dtype == held.dtype
            assert distance(one, other) < 4 * UNIT[dtype]


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("shape", [(64, 64, 64), (7, 300, 45), (128, 96, 400), (1, 512, 512)], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_the_output_lies_no_further_from_exact_than_pefts(dtype, autocast, shape, ratio) -> None:
    rows, width, out = shape
    errors = {}
    for library in (peftrs, peft):
        module = layer(library, dtype, width, out, ratio=ratio)
        x = torch.randn(rows, width).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        weight, down, up = tensors(module)
        errors[library] = distance(
            y, x.double() @ weight.mT + module.scaling["default"] * (x.double() @ down.mT) @ up.mT
        )
    # Two orders of summing in float32 differ by chance; a unit of rounding more or less is no difference
    # there.
    slack = 1.5 if dtype is torch.float32 and not autocast else 1.02
    assert errors[peftrs] <= slack * errors[peft]


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_dropout_keeps_the_share_and_the_mean(dtype: torch.dtype) -> None:
    """Over a weight of zeros, with A and B the identity, the output is the dropped input itself."""
    rows, width, kept = 400, 300, 0.7
    x, eye = torch.ones(rows, width, dtype=dtype), torch.eye(width, dtype=dtype)
    y = lora_linear(x, torch.zeros(width, width, dtype=dtype), None, eye, eye, 1.0, 1 - kept)
    assert y is not None
    share = (y != 0).double()
    assert (
        distance(y, share / kept) < 2 * UNIT[dtype] + 2**-16
    )  # the share is a multiple of 2⁻¹⁶, scaled by as it is
    assert_fair(share, kept)
    again = lora_linear(x, torch.zeros(width, width, dtype=dtype), None, eye, eye, 1.0, 1 - kept)
    assert not torch.equal(again, y)


def gradients(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    given = [x, *(one for one in module.parameters() if one.requires_grad)]
    found = [one.grad for one in given]
    for one in given:
        one.grad = None
    assert all(one is not None for one in found)
    return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_recomputation_drops_what_the_forward_pass_dropped(dtype: torch.dtype, reentrant: bool) -> None:
    module = layer(peftrs, dtype, 40, 24, lora_dropout=0.5)
    x = torch.randn(6, 40).to(dtype).requires_grad_()
    outcomes = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        y = run(x)
        y.backward(torch.ones_like(y))
        outcomes.append([y, *gradients(module, x)])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_a_seed_makes_the_run_repeatable_and_the_next_step_another() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        module = layer(peftrs, torch.float32, 40, 24, lora_dropout=0.5)
        x = torch.randn(6, 40).requires_grad_()
        outcomes = []
        for _ in range(2):
            torch.manual_seed(3)
            outcomes.append([step(module, x), step(module, x), *gradients(module, x)])
        assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))
        assert not torch.equal(*outcomes[0][:2])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_weight_that_is_computed_is_gone_between_the_passes(
    checkpointed: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "SMALL", -1)
    stored, alive = torch.randn(24, 40).to(torch.float32 if autocast else torch.bfloat16), []

    def compute() -> Tensor:
        made = stored.clone()
        alive.append(weakref.ref(made.untyped_storage()))
        return made

    weight = Unstored(compute, stored.shape, stored.dtype, stored.device)
    x, down, up = torch.randn(6, 40).bfloat16(), torch.randn(4, 40), torch.randn(24, 4)
    given = [one.requires_grad_() for one in (x, down, up)]

    def run(x: Tensor, weight: Tensor | Unstored) -> Tensor | None:
        return lora_linear(x, weight, None, down, up, 2.0, 0.5)

    outcomes = []
    for one in (stored, weight):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = checkpoint(run, x, one, use_reentrant=False) if checkpointed else run(x, one)
        assert [held for held in alive if held() is not None] == []
        outcomes.append([y, *torch.autograd.grad(y, given, torch.ones_like(y))])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))
    assert len(alive) == 2 + checkpointed
