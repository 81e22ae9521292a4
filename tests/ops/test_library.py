"""The operators that compiled graphs have: registered as torch asks, of one formula with eager code, safe in
a graph.
"""

from __future__ import annotations

import copy
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftrs
from peftrs.ops import lora_linear as package
from peftrs.ops.lora_linear import function, library
from tests.laws.cases import distance
from tests.ops.layers import layer

operators = torch.ops.peftrs
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def arguments(
    lead: tuple[int, ...], dtype: torch.dtype, wide: torch.dtype, bias: bool = True, grad: bool = True
) -> tuple[Tensor, ...]:
    width, out, rank = 7, 5, 3
    x, weight = torch.randn(*lead, width).to(dtype), torch.randn(out, width).to(dtype)
    down, up = torch.randn(rank, width).to(wide), torch.randn(out, rank).to(wide)
    shift = torch.randn(out).to(dtype) if bias else None
    for one in (x, down, up):
        one.requires_grad_(grad)
    return x, weight, shift, down, up


CASES = [
    ((4,), torch.float32, torch.float32, True, 0.0), ((2, 3), torch.float32, torch.float32, False, 0.5),
    ((4,), torch.bfloat16, torch.float32, True, 0.5), ((2, 2, 2), torch.float16, torch.float16, True, 0.0),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # opcheck itself runs what torch deprecates
@pytest.mark.parametrize(("lead", "dtype", "wide", "bias", "dropout"), CASES, ids=str)
def test_torch_accepts_the_registrations(lead, dtype, wide, bias, dropout) -> None:
    dropped, seed = (int(dropout * 2**16), torch.tensor([11])) if dropout else (0, None)
    given = arguments(lead, dtype, wide, bias)
    torch.library.opcheck(operators.lora_linear.default, (*given, 1.5, dropped, seed))
    x, weight, _, down, up = (None if one is None else one.detach() for one in given)
    y, u = operators.lora_linear(x, weight, None, down, up, 1.5, dropped, seed)
    for needs in ([True, True, True], [False, True, False], [False, False, False]):
        dy = torch.randn_like(y)
        torch.library.opcheck(
            operators.lora_linear_backward.default, (dy, x, weight, down, up, u, 1.5, dropped, seed, needs)
        )


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(("lead", "dtype", "wide", "bias", "dropout"), CASES, ids=str)
def test_the_operator_is_the_eager_function_to_the_bit(
    lead, dtype, wide, bias, dropout, autocast, monkeypatch
) -> None:
    monkeypatch.setattr(package, "SMALL", -1)
    x, weight, shift, down, up = arguments(lead, dtype, wide, bias)
    outcomes = []

    def graphs(*given: Tensor) -> Tensor:
        drawn = (round(dropout * 2**16), torch.randint(2**63 - 1, (1,))) if dropout else (0, None)
        return library.operator(*given, 1.5 / (1 - dropout), *drawn)

    for call in (lambda *given: package.lora_linear(*given, 1.5, dropout), graphs):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call(x, weight, shift, down, up)
        outcomes.append([y, *torch.autograd.grad(y, [x, down, up], torch.ones_like(y))])
    for one, other in zip(*outcomes, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_its_second_derivative_is_that_of_the_formula() -> None:
    x, weight, shift, down, up = (
        one.detach().double() for one in arguments((4,), torch.float32, torch.float32)
    )

    def run(*given: Tensor) -> Tensor:
        return library.operator(given[0], weight, shift, *given[1:], 0.7, 2**15, torch.tensor([3]))

    given = [one.requires_grad_() for one in (x, down, up)]
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_what_is_trained_gets_a_gradient(trained: tuple[bool, bool, bool]) -> None:
    x, weight, shift, down, up = arguments((4,), torch.float32, torch.float32, grad=False)
    for one, wanted in zip((x, down, up), trained, strict=True):
        one.requires_grad_(wanted)
    y = library.operator(x, weight, shift, down, up, 2.0, 0, None)
    assert y.requires_grad is any(trained)
    if any(trained):
        y.sum().backward()
    assert [one.grad is not None for one in (x, down, up)] == list(trained)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Has the operator stand in compiled graphs on the CPU, as it does on a GPU; the graphs that were
    compiled.
    """
    monkeypatch.setattr(package, "is_compiled", lambda _: True)
    torch._dynamo.reset()
    return []


def compiled(
    run: Callable[[Tensor], Tensor], graphs: list[torch.fx.GraphModule]
) -> Callable[[Tensor], Tensor]:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    return torch.compile(run, fullgraph=True, dynamic=True, backend=backend)


def outcome(
    run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, autocast: bool = False
) -> list[Tensor]:
    torch.manual_seed(1)
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(one.grad for one in module.parameters() if one.requires_grad)]


def calls(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_compiled_layer_is_one_operator_each_way(dtype, dropout, autocast, graphs) -> None:
    module = layer(peftrs, dtype, 12, 8, r=4, lora_dropout=dropout, bias=True)
    run = compiled(module, graphs)
    for rows in (6, 4):
        x = torch.randn(2, rows, 12).to(dtype)
        found = outcome(run, module, x, autocast)
        if dropout:
            continue  # the graph draws its seeds by itself; below, checkpointing holds the mask to one
        wanted = outcome(module, module, x, autocast)
        tolerance = TOLERANCE[torch.bfloat16 if autocast else dtype]
        assert all(distance(one, other) < tolerance for one, other in zip(found, wanted, strict=True))
    assert len(graphs) == 2  # dynamic: no other for another number of rows
    forward, backward = map(calls, graphs)
    assert forward.count("peftrs.lora_linear.default") == 1
    assert backward.count("peftrs.lora_linear_backward.default") == 1
    products = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}
    assert not products & {*forward, *backward}


def test_compiled_dropout_is_one_mask_in_forward_and_backward(graphs) -> None:
    """Over a weight of zeros, with A and B the identity, output and gradient are the mask."""
    eye = torch.eye(40)
    run = compiled(lambda x: package.lora_linear(x, torch.zeros(40, 40), None, eye, eye, 1.0, 0.5), graphs)
    x = torch.ones(30, 40, requires_grad=True)
    first, second = run(x), run(x)
    first.sum().backward()
    assert torch.equal(first, x.grad)
    assert 0.4 < float((first != 0).double().mean()) < 0.6
    assert not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_makes_it_again_the_same(reentrant: bool) -> None:
    x, weight, shift, down, up = arguments((6,), torch.float32, torch.float32)

    def run(x: Tensor) -> Tensor:
        return library.operator(x, weight, shift, down, up, 2.0, 2**15, torch.randint(2**63 - 1, (1,)))

    outcomes = []
    for call in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        torch.manual_seed(4)
        y = call(x)
        outcomes.append(
            [y, *torch.autograd.grad(y, [down, up], torch.ones_like(y))] if not reentrant else [y]
        )
        if reentrant:
            y.sum().backward()
            outcomes[-1] += [one.grad for one in (x, down, up)]
            x.grad = down.grad = up.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_a_compiled_checkpoint_makes_it_again_the_same(graphs) -> None:
    module = layer(peftrs, torch.float32, 12, 8, r=4)
    x = torch.randn(6, 12)
    run = compiled(lambda x: checkpoint(module, x.sin(), use_reentrant=False), graphs)
    for one, other in zip(
        outcome(run, module, x), outcome(lambda x: module(x.sin()), module, x), strict=True
    ):
        assert distance(one, other) < 2e-6
    assert "peftrs.lora_linear.default" in calls(graphs[1])


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is:FutureWarning"
)  # torch's own forward mode still uses it
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
@pytest.mark.parametrize("name", ["grad", "vmap", "jvp"])
def test_compiled_transforms_of_functions_take_the_composite(name: str, graphs) -> None:
    """The operator knows no such transform: forward mode through it would be wrong without a word."""
    module, x = layer(peftrs, torch.float32, 12, 8, r=4), torch.randn(6, 12)
    run = {
        "grad": torch.func.grad(lambda x: module(x).square().sum()),
        "vmap": lambda x: torch.func.vmap(lambda row: module(row))(x),
        "jvp": lambda x: torch.func.jvp(module, (x,), (x,))[1],
    }[name]
    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert distance(found, run(x)) < 2e-6


def test_a_copy_of_a_layer_compiles_for_itself(graphs) -> None:
    module = layer(peftrs, torch.float32, 12, 8, r=4)
    x = torch.randn(6, 12)
    compiled(module, graphs)(x)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.lora_B["default"].weight.zero_()
    assert distance(compiled(other, graphs)(x), other.base_layer(x)) < 2e-6


def test_on_the_cpu_and_in_exported_programs_the_composite_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(peftrs, torch.float32, 12, 8, r=4)
    assert not package.is_compiled(torch.device("cpu"))
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    compiled(module, graphs)(torch.randn(6, 12).requires_grad_())
    assert graphs
    assert not any(name.startswith("peftrs") for graph in graphs for name in calls(graph))
    if not hasattr(torch.compiler, "is_exporting"):
        return
    monkeypatch.setattr(package, "has_kernels", lambda _: True)
    exported = torch.export.export(module.eval(), (torch.randn(6, 12),))
    assert not any(name.startswith("peftrs") for name in calls(exported.graph_module))


def test_a_compiler_takes_it_as_given_whether_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding out imports Triton and asks the device, which a graph cannot hold."""
    monkeypatch.setattr(
        function, "kernels", functools.cache(lambda: SimpleNamespace(is_available=lambda _: True))
    )
    gpu = torch.device("cuda")
    torch._dynamo.reset()
    run = torch.compile(lambda x: (function.has_kernels(gpu), x + 1), fullgraph=True, backend="eager")
    assert [bool(run(torch.zeros(1))[0]), function.has_kernels(torch.device("cpu"))] == [True, False]


def test_no_operator_runs_in_eager_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        library, "operator", lambda *_: pytest.fail("an opaque operator costs more than the function")
    )
    monkeypatch.setattr(package, "operator", library.operator)
    outcome(module := layer(peftrs, torch.float32, 12, 8, r=4), module, torch.randn(6, 12))


def test_importing_the_operation_imports_no_compiler() -> None:
    """They take seconds, which is for those to spend who compile."""
    program = (
        "import sys, peftrs.ops.lora_linear; print(sorted({'torch._dynamo', 'torch._inductor', 'triton'} &"
        " set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_without_triton_all_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function, "kernels", lambda: None)
    assert not function.has_kernels(torch.device("cuda"))
    x, weight, _, down, up = arguments((4,), torch.float32, torch.float32)
    assert function.passes(x, down) is function.reference
    assert package.unfit(weight.to("meta"), down, up, 0.5) == "no dropout from a seed on this kind of device"


def test_on_a_gpu_the_operator_takes_float32_factors_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that only know their device: no GPU is needed to see what would run."""
    pytest.importorskip("triton")
    from torch._subclasses import FakeTensorMode

    from peftrs.ops.lora_linear import triton

    monkeypatch.setattr(triton, "is_available", lambda _: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    seen = []
    with FakeTensorMode(), torch.device("cuda"):
        x, weight, seed = torch.empty(2, 6, 12), torch.empty(8, 12), torch.empty(1, dtype=torch.int64)
        down, up = torch.empty(4, 12), torch.empty(8, 4)
        for autocast in (False, True):
            torch.set_autocast_enabled("cuda", autocast)  # the context refuses where there is no GPU
            y, u = operators.lora_linear(x, weight, None, down, up, 1.0, 9, seed)
            torch.set_autocast_enabled("cuda", False)
            narrow = weight.to(y.dtype)
            gradients = operators.lora_linear_backward(y, x, narrow, down, up, u, 1.0, 9, seed, [True] * 3)
            assert {one.device.type for one in (y, u, *gradients)} == {"cuda"}
            assert [one.shape for one in (y, u, *gradients)] == [
                (2, 6, 8),
                (12, 4),
                x.shape,
                down.shape,
                up.shape,
            ]
            seen.append([one.dtype for one in (y, u, *gradients)])
    assert seen == [[one, *[torch.float32] * 4] for one in (torch.float32, torch.bfloat16)]
