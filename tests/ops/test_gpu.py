"""An adapted layer on a GPU: the kernels run, agree with the composite, and go wherever a training step
goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftrs
import peftrs.ops
from peftrs.ops.lora_linear import function
from tests.laws.cases import distance
from tests.ops.layers import layer

if not torch.cuda.is_available():
    pytest.skip("no GPU here: `make test-gpu` runs these where there is one", allow_module_level=True)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
WIDTH, OUT = 264, 200
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch.cuda.set_sync_debug_mode("default")


class Counted:
    """How often the kernels' passes ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        module = function.kernels()
        for name in ("high", "backward"):
            monkeypatch.setattr(module, name, self.counting(getattr(module, name)))

    def counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            self.runs += 1
            return original(*given)

        return run


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def adapted(dtype: torch.dtype, dropout: float = 0.0, **settings: Any) -> tuple[nn.Module, Tensor]:
    module = layer(peftrs, dtype, WIDTH, OUT, bias=True, lora_dropout=dropout, **settings).cuda()
    return module, torch.randn(3, 50, WIDTH).to("cuda", dtype)


def outcome(
    run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, autocast: bool = False, seed: int = 1
) -> list[Tensor]:
    torch.manual_seed(seed)
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = run(leaf)
    y.float().square().sum().backward()
    return [y.detach(), leaf.grad, *(one.grad for one in module.parameters() if one.requires_grad)]


def agree(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    return all(distance(one, other) < tolerance for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("r", [3, 16, 64, 200])
@dtypes
def test_eager_code_runs_the_kernels_and_agrees_with_the_composite(
    dtype, r, use_dora, autocast, counted
) -> None:
    module, x = adapted(dtype, r=r, use_dora=use_dora)
    found = outcome(module, module, x, autocast)
    assert counted.runs == (2 if r <= 128 else 0)
    with peftrs.ops.fused(False):
        wanted = outcome(module, module, x, autocast)
    assert agree(found, wanted, TOLERANCE[torch.bfloat16 if autocast else dtype])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("r", [16, 200])
@dtypes
def test_checkpointing_drops_what_the_forward_pass_dropped(dtype, r, reentrant, counted) -> None:
    module, x = adapted(dtype, dropout=0.5, r=r)
    wanted = outcome(module, module, x)
    found = outcome(lambda x: checkpoint(module, x, use_reentrant=reentrant), module, x)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert not torch.equal(outcome(module, module, x, seed=2)[0], wanted[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_step_never_waits_for_the_device(dropout: float) -> None:
    module, x = adapted(torch.bfloat16, dropout)
    outcome(module, module, x)
    torch.cuda.set_sync_debug_mode("error")
    outcome(module, module, x)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_code_runs_the_kernels(dtype, dropout, autocast, mode, counted) -> None:
    module, x = adapted(dtype, dropout)
    run = torch.compile(module, fullgraph=True, mode=mode)
    found = [one.clone() for one in outcome(run, module, x, autocast)]
    assert counted.runs >= 2
    assert all(one.isfinite().all() for one in found)
    if not dropout:
        assert agree(
            found, outcome(module, module, x, autocast), TOLERANCE[torch.bfloat16 if autocast else dtype]
        )


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_is_one_mask_forward_and_backward(compiled: bool) -> None:
    """Over a weight of zeros, with A and B the identity, output and gradient of the input are the mask."""
    module = layer(peftrs, torch.float32, 96, 96, r=96, lora_alpha=96, lora_dropout=0.5).cuda()
    with torch.no_grad():
        module.base_layer.weight.zero_()
        for slot in (module.lora_A, module.lora_B):
            slot["default"].weight.copy_(torch.eye(96))
    run = torch.compile(module, fullgraph=True) if compiled else module
    x = torch.ones(70, 96, device="cuda", requires_grad=True)
    first, second = run(x), run(x)
    first.sum().backward()
    assert torch.equal(first, x.grad)
    assert 0.45 < float((first != 0).double().mean()) < 0.55
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_captured_graph_trains_and_draws_anew(dropout: float) -> None:
    module, x = adapted(torch.bfloat16, dropout)
    leaf = x.clone().requires_grad_()

    def step() -> Tensor:
        y = module(leaf)
        y.float().square().sum().backward()
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    module.zero_grad(set_to_none=True)
    leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    seen = []
    for _ in range(2):
        for one in (leaf, *module.parameters()):
            if one.grad is not None:
                one.grad.zero_()
        graph.replay()
        seen.append(
            [y.clone(), *(one.grad.clone() for one in (leaf, *module.parameters()) if one.requires_grad)]
        )
    assert all(one.isfinite().all() for one in seen[0])
    assert torch.equal(seen[0][0], seen[1][0]) is not bool(dropout)
    if not dropout:
        assert agree(seen[0], outcome(module, module, x), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_layer_of_nf4_trains_in_one_operation_and_in_a_captured_graph(
    dropout: float, counted: Counted
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bitsandbytes.nn.Linear4bit(WIDTH, OUT, False, torch.bfloat16, quant_type="nf4").cuda()
    module = layer(peftrs, torch.bfloat16, WIDTH, OUT, base=base, lora_dropout=dropout).cuda()
    assert module.routes() == {"default": "fused"}
    x = torch.randn(3, 50, WIDTH, device="cuda", dtype=torch.bfloat16)
    found = outcome(module, module, x)
    assert counted.runs == 2
    assert all(
        map(torch.equal, outcome(lambda x: checkpoint(module, x, use_reentrant=False), module, x), found)
    )
    if not dropout:
        with peftrs.ops.fused(False):
            assert agree(found, outcome(module, module, x), TOLERANCE[torch.bfloat16])
    graphed = torch.cuda.make_graphed_callables(module, (x.clone().requires_grad_(),))
    seen = [outcome(graphed, module, x, seed=seed) for seed in (1, 2)]
    assert torch.equal(seen[0][0], seen[1][0]) is not bool(dropout)


def test_several_adapters_run_the_kernels_as_one(counted: Counted) -> None:
    model = peftrs.get_peft_model(
        nn.Sequential(nn.Linear(WIDTH, OUT).cuda().bfloat16()),
        config := peftrs.LoraConfig(target_modules=["0"], r=4, init_lora_weights=False),
    )
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    module, x = (
        model.base_model.model[0].train(),
        torch.randn(3, 50, WIDTH, device="cuda", dtype=torch.bfloat16),
    )
    found = outcome(module, module, x)
    assert counted.runs == 2
    with peftrs.ops.fused(False):
        assert agree(found, outcome(module, module, x), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@dtypes
def test_what_is_kept_for_the_backward_pass_is_a_fiftieth_of_the_input(
    dtype: torch.dtype, dropout: float
) -> None:
    x = torch.randn(4096, 4096).to("cuda", dtype).requires_grad_()
    kept = []
    for library in (peftrs, None):
        module = layer(library, dtype, 4096, 64, lora_dropout=dropout).cuda()
        module(x).sum().backward()  # what a first call loads stays
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = module(x)
        kept.append(torch.cuda.memory_allocated() - before)
        del y
    assert 0 < kept[0] - kept[1] <= 0.02 * 4096 * 4096 * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_layers_on_another_device_than_the_current_one_run_there() -> None:
    module, x = adapted(torch.bfloat16)
    wanted = outcome(module, module, x)
    found = outcome(module.to("cuda:1"), module, x.to("cuda:1"))
    assert agree([one.cuda(0) for one in found], wanted, TOLERANCE[torch.bfloat16])
