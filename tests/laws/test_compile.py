"""The fold traces without a graph break, forward and backward, and gives what eager mode gives."""

import pytest
import torch
from torch import Tensor, nn

from peftrs.core import manage
from tests.laws.cases import CASES, KINDS, WAYS_FOR, adapted, distance, ids


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.square().sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def check(model: nn.Module, kind: str) -> None:
    inputs = KINDS[kind].inputs(torch.float32)
    expected = model(*inputs)
    wanted = gradients(model, expected)
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    assert distance(output, expected) < 2e-6
    found = gradients(model, output)
    assert found.keys() == wanted.keys() != set()
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-5), name


PLAINEST = ("lora", "lora-bias", "pissa", "dora", "ia3-outputs", "ia3-inputs", "oft")
"""One way for each path through a method's code; the others are traced by the long tier."""


def traced(cases: list[tuple[str, ...]]) -> pytest.MarkDecorator:
    tiers = [
        pytest.param(case, marks=() if case[0] in PLAINEST else pytest.mark.long, id=ids(case))
        for case in cases
    ]
    return pytest.mark.parametrize("case", tiers)


@traced(CASES)
def test_one_adapter_traces_without_a_break(case: tuple[str, str]) -> None:
    way, kind = case
    check(adapted([way], kind).train(), kind)


# Each way beside another one, so that each acts both on the layer and on an adapter, from outside and from
# inside.
PAIRS = [(way, WAYS_FOR[kind][WAYS_FOR[kind].index(way) - 1], kind) for way, kind in CASES]


@traced(PAIRS)
def test_two_adapters_trace_without_a_break(case: tuple[str, str, str]) -> None:
    way, other, kind = case
    model = adapted([way, other], kind).train()
    manage.set_adapter(model, ["a", "b"])
    check(model, kind)


def test_switching_adapters_needs_no_new_model() -> None:
    model = adapted(["lora", "oft"], "linear")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = KINDS["linear"].inputs(torch.float32)
    for active in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        manage.set_adapter(model, active)
        assert distance(compiled(*inputs), model(*inputs)) < 2e-6
    with manage.disabled(model):
        assert torch.equal(compiled(*inputs), model(*inputs))
