"""Whatever a training step is made of, an adapted layer does the same: fused where that goes, composed where
it does not.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

import peftrs
import peftrs.ops
from peftrs.ops import lora_linear as op
from tests.bases import formats
from tests.laws.cases import distance
from tests.ops.layers import layer

WIDTH, OUT, ROWS = 16, 8, 6
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
aten = torch.ops.aten


class Fused:
    """Counts how often the fused operation ran, which here takes small inputs too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        monkeypatch.setattr(op.LoraLinear, "apply", self.counting(op.LoraLinear.apply))
        monkeypatch.setattr(op, "forward", self.counting(op.forward))
        monkeypatch.setattr(op, "SMALL", -1)

    def counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            self.runs += 1
            return original(*given)

        return run


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Fused:
    return Fused(monkeypatch)


def selective(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Checkpointing that keeps the results of products, as the recipes for large models do."""

    def policy(context: Any, function: Any, *given: Any, **options: Any) -> CheckpointPolicy:
        products = (aten.mm.default, aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if function in products else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda x: checkpoint(
        run, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )


def compiled(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)


MODES: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "eager": lambda run: run,
    "checkpoint": lambda run: lambda x: checkpoint(run, x, use_reentrant=False),
    "reentrant": lambda run: lambda x: checkpoint(run, x, use_reentrant=True),
    "selective": selective,
    "compile": compiled,
}
BASES: dict[str, Callable[[nn.Linear, torch.dtype], nn.Module]] = {
    "linear": lambda dense, _: dense,
    "conv1d": lambda _, dtype: Conv1D(OUT, WIDTH).to(dtype),
    "bnb-nf4": lambda dense, dtype: formats.four_bit("nf4", True, dtype)(dense),
    "bnb-int8": lambda dense, _: formats.eight_bit(dense),
    "hqq-4": lambda dense, dtype: formats.hqq(4, dtype)(dense),
    "torchao-int8": lambda dense, _: formats.torchao("int8")(dense),
}
QUANTIZED = [name for name in BASES if "-" in name]
CELLS = list(itertools.product(MODES, TOLERANCE, [False, True], [0.0, 0.5], [False, True], BASES))


def composes(mode: str, dtype: torch.dtype, autocast: bool, base: str, small: bool) -> bool:
    """Whether torch and the library have the cell at all.

    HQQ's layer does not know autocast. Selective checkpointing does not know the casts that autocast keeps:
    two calls of a float32 `nn.Linear` that is trained fail there.
    """
    if base in QUANTIZED and find_spec(formats.library(base)) is None:
        return False
    if not (base in QUANTIZED and autocast):
        return True
    return not (
        ((small or dtype is torch.float32) and mode == "selective")
        or (dtype is torch.float32 and base.startswith("hqq"))
    )


def made(dtype: torch.dtype, dropout: float, bias: bool, base: str) -> nn.Module:
    """The adapted layer of a cell."""
    torch.manual_seed(0)
    frozen = BASES[base](nn.Linear(WIDTH, OUT, bias=bias).to(dtype), dtype)
    frozen(
        torch.zeros(1, WIDTH, dtype=dtype)
    )  # in its first call, a library gives the bias the dtype of the input
    return layer(
        peftrs, dtype, WIDTH, OUT, base=frozen, r=4, lora_dropout=dropout, fan_in_fan_out=base == "conv1d"
    )


def outcome(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    """Output and gradients of two accumulated steps, the second of which uses its input twice."""
    torch.manual_seed(1)
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first, second = run(leaf), run(leaf) + run(leaf)
    first.square().sum().backward()
    second.square().sum().backward()
    found = [
        first.detach(),
        second.detach(),
        leaf.grad,
        *(one.grad for one in module.parameters() if one.requires_grad),
    ]
    assert all(one is not None for one in found)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
def test_every_cell_of_the_matrix_is_right(
    mode: str,
    autocast: bool,
    small: bool,
    fused: Fused,
    monkeypatch: pytest.MonkeyPatch,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    if small:
        monkeypatch.setattr(op, "SMALL", 2**17)
    cells = [
        cell
        for cell in CELLS
        if cell[0] == mode and cell[2] is autocast and composes(*cell[:3], cell[5], small)
    ]
    ran = 0
    for _, dtype, _, dropout, bias, base in cells:
        module = made(dtype, dropout, bias, base)
        x = torch.randn(2, ROWS // 2, WIDTH).to(dtype)
        fused.runs = 0
        found = outcome(MODES[mode](module), module, x, autocast)
        ran += fused.runs > 0
        if dropout and mode == "compile":
            continue  # the composite draws another mask; its laws are torch's own
        if dropout:
            wanted = outcome(module, module, x, autocast)
        else:
            with peftrs.ops.fused(False):
                wanted = outcome(module, module, x, autocast)
        tolerance = TOLERANCE[torch.bfloat16 if autocast else dtype]
        assert all(distance(one, other) < tolerance for one, other in zip(found, wanted, strict=True)), (
            dtype,
            dropout,
            bias,
            base,
        )
    record_testsuite_property(
        f"fused cells, {mode}, autocast {autocast}{', small' * small}", f"{ran} of {len(cells)}"
    )

    def runs(dtype: torch.dtype, base: str) -> bool:
        if mode == "compile":
            return False
        if base in QUANTIZED:  # under autocast, a library computes in a dtype of its own where it has one
            return not small and (not autocast or dtype is torch.bfloat16)
        return not small

    assert ran == sum(runs(dtype, base) for _, dtype, *_, base in cells)


SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True}, "lora_bias": {"lora_bias": True}, "dora": {"use_dora": True},
    "several": {}, "pissa": {},
}  # fmt: skip
MASTERS = [
    (torch.float32, True),
    (torch.bfloat16, True),
    (torch.bfloat16, False),
    (torch.float16, True),
    (torch.float16, False),
]
"""The base's dtype, and whether narrow ones have adapters in float32."""


def composed(kind: str, dtype: torch.dtype, masters: bool, dropout: float) -> nn.Module:
    """A layer whose adapters are all but plain."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, OUT).to(dtype))
    config = peftrs.LoraConfig(
        target_modules=["0"], r=4, init_lora_weights=False, lora_dropout=dropout, **SETTINGS[kind]
    )
    if kind == "pissa":
        config = peftrs.LoraConfig(target_modules=["0"], r=4, init_lora_weights="pissa", lora_dropout=dropout)
    model = peftrs.get_peft_model(base, config, autocast_adapter_dtype=masters).train()
    if kind == "several":
        model.add_adapter("second", config, autocast_adapter_dtype=masters)
        model.base_model.set_adapter(["default", "second"])
    return model.base_model.model[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SETTINGS)
def test_what_is_not_a_plain_lora_does_the_same_in_every_mode(
    kind: str, mode: str, fused: Fused, record_testsuite_property: Callable[[str, object], None]
) -> None:
    cells = list(itertools.product(MASTERS, [0.0, 0.5] if mode != "compile" else [0.0]))
    ran = 0
    for (dtype, masters), dropout in cells:
        module = composed(kind, dtype, masters, dropout)
        x = torch.randn(2, ROWS // 2, WIDTH).to(dtype)
        fused.runs = 0
        found = outcome(MODES[mode](module), module, x, False)
        ran += fused.runs > 0
        if dropout:
            wanted = outcome(module, module, x, False)  # the same masks, drawn again in recomputation
        else:
            with peftrs.ops.fused(False):
                wanted = outcome(module, module, x, False)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
        for one, other in zip(found, wanted, strict=True):
            assert distance(one, other) < tolerance, (dtype, masters, dropout)
    record_testsuite_property(f"fused cells, {kind}, {mode}", f"{ran} of {len(cells)}")
    # Dropout does not act on the factors that PiSSA took out of the weight.
    expected = 0 if mode == "compile" else len(MASTERS) if kind == "pissa" else len(cells)
    assert ran == expected


def test_copies_of_a_trained_layer_train_as_it_does(fused: Fused) -> None:
    module, x = plain()
    step = outcome(module, module, x, False)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        fused.runs = 0
        found = outcome(copied, copied, x, False)
        assert fused.runs == 3
        assert all(torch.equal(one, other) for one, other in zip(found, step, strict=True))


def plain() -> tuple[nn.Module, Tensor]:
    return layer(peftrs, torch.float32, WIDTH, OUT, r=4), torch.randn(ROWS, WIDTH)


def test_compiled_once_it_takes_other_numbers_of_rows() -> None:
    module, x = plain()
    torch._dynamo.reset()
    run = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 5, 3):
        assert distance(run(x[:rows]), module(x[:rows])) < 2e-6


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is:FutureWarning"
)  # torch's own forward mode still uses it
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
def test_transforms_of_functions_fall_back() -> None:
    module, x = plain()
    parameters = {name: one.detach() for name, one in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    module(x).square().sum().backward()
    found = torch.func.grad(loss)(parameters, x)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for name, one in module.named_parameters():
        if one.requires_grad:
            assert distance(found[name], one.grad) < 2e-6
            assert distance(each[name].sum(0), one.grad) < 2e-6
    _, tangent = torch.func.jvp(lambda x: module(x), (x,), (x,))
    assert distance(tangent, module(x)) < 2e-6
    with torch.autograd.forward_ad.dual_level():
        dual = module(torch.autograd.forward_ad.make_dual(x, x))
        assert distance(torch.autograd.forward_ad.unpack_dual(dual).tangent, module(x)) < 2e-6


def test_a_trace_records_plain_operations(fused: Fused) -> None:
    module, x = plain()
    exported = torch.export.export(module.eval(), (x,))
    assert fused.runs == 0
    assert distance(exported.module()(x), module(x)) < 2e-6


def test_without_gradients_and_in_inference_mode_the_output_is_the_same(fused: Fused) -> None:
    module, x = plain()
    expected = module(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(module(x), expected)
    assert fused.runs == 3


def hooked(module: nn.Module) -> list[str]:
    calls: list[str] = []
    module.base_layer.register_forward_hook(lambda *_: calls.append("hook"))
    return calls


def replaced(module: nn.Module) -> list[str]:
    calls, own = [], module.base_layer.forward
    module.base_layer.forward = lambda x: calls.append("forward") or own(x)
    return calls


def subclassed(module: nn.Module) -> list[str]:
    calls: list[str] = []

    class Told(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("forward")
            return super().forward(x)

    module.base_layer.__class__ = Told
    return calls


@pytest.mark.parametrize("watch", [hooked, replaced, subclassed])
def test_who_watches_the_frozen_layer_sees_it_called(
    watch: Callable[[nn.Module], list[str]], fused: Fused
) -> None:
    module, x = plain()
    expected = module(x)
    calls = watch(module)
    assert module.routes()["default"].startswith("composite: the layer beneath has ")
    assert distance(module(x), expected) < 2e-6
    assert (len(calls), fused.runs) == (1, 1)


def test_a_hook_on_all_modules_sees_the_frozen_layer() -> None:
    module, x = plain()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda one, *_: seen.append(one))
    module(x)
    handle.remove()
    assert module.base_layer in seen


def test_the_switch_turns_it_off_and_on(fused: Fused) -> None:
    module, x = plain()
    with peftrs.ops.fused(False):
        module(x)
        assert module.routes() == {"default": "composite: fused operations are turned off"}
    assert fused.runs == 0
    module(x)
    assert (fused.runs, module.routes()) == (1, {"default": "fused"})


def test_a_trained_weight_beneath_keeps_its_gradient() -> None:
    module, x = plain()
    module.base_layer.weight.requires_grad_(True)
    module(x).sum().backward()
    assert module.base_layer.weight.grad is not None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_several_adapters_run_as_one_unless_each_drops_by_itself(dropout: float, fused: Fused) -> None:
    module = composed("several", torch.float32, True, dropout)
    one, other = module.routes().values()
    assert one == "fused"
    assert other == ("composite: another adapter lies beneath" if dropout else "fused")
    module(torch.randn(ROWS, WIDTH))
    assert fused.runs == 1
    with torch.no_grad():
        module.eval()
        x = torch.randn(ROWS, WIDTH)
        assert set(module.routes().values()) == {"fused"}
        assert distance(module(x), nn.functional.linear(x, *module.folded())) < 2e-6


@pytest.mark.parametrize("mode", ["eager", "checkpoint", "reentrant", "selective"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_a_library_that_rounds_its_input_is_joined(
    bias: bool, dropout: float, narrow: torch.dtype, mode: str, fused: Fused
) -> None:
    """As after `prepare_model_for_kbit_training`, whose norms are float32: only the product with the weight
    is narrower.
    """
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    frozen = formats.four_bit("nf4", True, narrow)(nn.Linear(WIDTH, OUT, bias=bias))
    module = layer(peftrs, torch.float32, WIDTH, OUT, base=frozen, r=4, lora_dropout=dropout)
    x = torch.randn(2, ROWS // 2, WIDTH)
    found = outcome(MODES[mode](module), module, x, False)
    assert fused.runs > 0
    assert {one.dtype for one in found} == {torch.float32}
    if dropout:
        wanted = outcome(module, module, x, False)
    else:
        with peftrs.ops.fused(False):
            wanted = outcome(module, module, x, False)
    assert all(distance(one, other) < 2e-6 for one, other in zip(found, wanted, strict=True))


def test_a_library_that_does_not_round_its_input_refuses_as_it_does() -> None:
    pytest.importorskip("hqq")
    module = made(torch.bfloat16, 0.0, True, "hqq-4")
    with pytest.raises(RuntimeError, match="dtype"):
        module(torch.randn(ROWS, WIDTH))


def test_what_is_composed_keeps_no_numbers_for_the_backward_pass() -> None:
    module, x = plain()
    with peftrs.ops.fused(False), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        y = module(x)
    sizes = [
        event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    assert y.untyped_storage().nbytes() in sizes
    assert sizes.count(8) == sizes.count(-8)


def test_inference_over_a_quantized_layer_is_the_librarys_own(fused: Fused) -> None:
    pytest.importorskip("bitsandbytes")
    module = made(torch.float32, 0.0, True, "bnb-nf4")
    assert module.routes() == {"default": "fused"}
    module.eval()
    module(torch.randn(ROWS, WIDTH))
    assert module.routes() == {"default": "composite: in eval mode the library's own product runs"}
    assert fused.runs == 0
