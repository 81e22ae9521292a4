"""The way of small inputs: taken where nothing is out of the ordinary, and right after whatever happens to a
layer.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import peftrs
import peftrs.ops
from peftrs.ops import lora_linear
from tests.laws.cases import distance
from tests.ops.layers import layer

WIDTH, OUT = 12, 20


class Taken:
    """Counts how often the shortcut computed the output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        original = lora_linear.composed
        # In its own module alone: the long way comes to the same formula.
        monkeypatch.setattr("peftrs.core.route.lora_linear", _Spied(lora_linear, self, original))


class _Spied:
    def __init__(self, module: Any, taken: Taken, original: Callable[..., Tensor]) -> None:
        self.module, self.taken, self.original = module, taken, original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def composed(self, *given: Any) -> Tensor:
        self.taken.runs += 1
        return self.original(*given)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    return Taken(monkeypatch)


def adapted(dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    return layer(peftrs, dtype, WIDTH, OUT, r=4, lora_alpha=6, **settings)


def agrees(module: nn.Module, x: Tensor, taken: Taken, *, expected: bool = True, **options: Any) -> None:
    """Holds the layer's output and gradients against the composed layer's, and whether the shortcut was
    taken.
    """
    outcomes = []
    for fused in (True, False):
        taken.runs = 0
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        with peftrs.ops.fused(fused):
            y = module(leaf, **options)
        y.square().sum().backward()
        found = [one.grad for one in module.parameters() if one.requires_grad and one.grad is not None]
        outcomes.append([y.detach(), leaf.grad, *(one.clone() for one in found)])
        assert taken.runs == (fused and expected)
    assert len(outcomes[0]) == len(outcomes[1])
    tolerance = 2e-6 if outcomes[0][0].dtype is torch.float32 else 4e-2
    assert all((one - other).norm() <= tolerance * other.norm() for one, other in zip(*outcomes, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (3, 2, WIDTH), (0, WIDTH), (2, 0, WIDTH)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "masters"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)], ids=str
)
def test_inputs_of_every_shape_take_it(
    dtype: torch.dtype, masters: bool, shape: tuple[int, ...], bias: bool, taken: Taken
) -> None:
    module = adapted(dtype, bias=bias)
    if not masters:
        module.to(dtype)
    agrees(module, torch.randn(shape).to(dtype), taken)


def test_it_drops_in_training_alone(taken: Taken) -> None:
    module, x = adapted(lora_dropout=0.5), torch.randn(3, WIDTH)
    outcomes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outcomes.append(module(x))
    assert taken.runs == 3
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])
    agrees(module.eval(), x, taken)


def again(module: nn.Module) -> None:
    module.base_layer.weight.data.mul_(2)


def assigned(module: nn.Module) -> None:
    module.load_state_dict({name: one * 2 for name, one in module.state_dict().items()}, assign=True)


def moved(module: nn.Module) -> None:
    module.to(torch.bfloat16)


def replaced(module: nn.Module) -> None:
    module.base_layer = nn.Linear(WIDTH, OUT).requires_grad_(False)


def rewrapped(module: nn.Module) -> None:
    held = module.lora_A["default"]
    module.lora_A["default"] = other = copy.deepcopy(held)
    other.weight.data.mul_(3)


def rescaled(module: nn.Module) -> None:
    module.set_scale("default", 3.0)


def shared(module: nn.Module) -> None:
    module.base_layer.weight = nn.Parameter(torch.randn(OUT, WIDTH), requires_grad=False)


CHANGES = [again, assigned, moved, replaced, rewrapped, rescaled, shared]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_it_follows_what_happens_to_the_layer(change: Callable[[nn.Module], None], taken: Taken) -> None:
    module, x = adapted(), torch.randn(3, WIDTH)
    before = module(x)
    change(module)
    x = x.to(module.base_layer.weight.dtype)
    y = module(x)  # where modules were replaced, this call goes the long way
    assert distance(y.float(), before) > 1e-3
    agrees(module, x, taken)


def test_it_follows_what_is_active(taken: Taken) -> None:
    model = peftrs.get_peft_model(
        nn.Sequential(nn.Linear(WIDTH, OUT)), peftrs.LoraConfig(target_modules=["0"], r=4)
    )
    model.add_adapter("other", peftrs.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    module, x = model.base_model.model[0], torch.randn(3, WIDTH)
    outputs = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        agrees(module, x, taken)
        outputs[name] = module(x)
    assert distance(outputs["default"], outputs["other"]) > 1e-3
    module.set_adapter("other")
    assert torch.equal(module(x), outputs["other"])
    module.set_adapter("default")
    taken.runs = 0
    with model.disable_adapter():
        assert torch.equal(module(x), module.base_layer(x))
    model.base_model.set_adapter(["default", "other"])
    agrees(module, x, taken)
    model.set_adapter("other")
    model.merge_adapter()
    taken.runs = 0
    assert distance(module(x), outputs["other"]) < 2e-6
    model.unmerge_adapter()
    assert taken.runs == 0
    model.set_adapter("default")
    model.delete_adapter("other")
    model.add_adapter("other", peftrs.LoraConfig(target_modules=["0"], r=3, init_lora_weights=False))
    model.set_adapter("other")
    agrees(module, x, taken)
    assert distance(module(x), outputs["other"]) > 1e-3


def hooked(module: nn.Module) -> None:
    module.base_layer.register_forward_hook(lambda _module, _inputs, y: 2 * y)


def overridden(module: nn.Module) -> None:
    module.base_layer.forward = lambda x: 2 * nn.Linear.forward(module.base_layer, x)


def parametrized(module: nn.Module) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(module.base_layer, "weight", Doubled())


def mixed(module: nn.Module) -> None:
    module.base_layer.bias.data = module.base_layer.bias.data.double()
    module.base_layer.weight.data = module.base_layer.weight.data.double()
    module.base_layer.forward = lambda x: nn.functional.linear(
        x.double(), *module.base_layer._parameters.values()
    ).float()


@pytest.mark.parametrize(
    "change", [hooked, overridden, parametrized, mixed], ids=lambda change: change.__name__
)
def test_what_is_out_of_the_ordinary_goes_the_long_way(
    change: Callable[[nn.Module], None], taken: Taken
) -> None:
    module, x = adapted(bias=True), torch.randn(3, WIDTH)
    module(x)
    assert taken.runs == 1
    change(module)
    agrees(module, x, taken, expected=False)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_bias": True}, {"use_qalora": True, "qalora_group_size": 4}],
    ids=str,
)
def test_what_is_not_one_product_goes_the_long_way(settings: dict[str, Any], taken: Taken) -> None:
    base = nn.Linear(WIDTH, OUT)
    config = peftrs.LoraConfig(target_modules=["0"], r=4, init_lora_weights=False, **settings)
    agrees(
        peftrs.get_peft_model(nn.Sequential(base), config).base_model.model[0],
        torch.randn(3, WIDTH),
        taken,
        expected=False,
    )


def test_copies_have_their_own(taken: Taken) -> None:
    module, x = adapted(), torch.randn(3, WIDTH)
    before = module(x)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), before)
        copied.lora_B["default"].weight.data.zero_()
        copied.base_layer.weight.data.zero_()
        agrees(copied, x, taken)
        assert not copied(x).any()
        assert torch.equal(module(x), before)


def test_parameters_of_a_call_are_those_that_act(taken: Taken) -> None:
    module, x = adapted(), torch.randn(3, WIDTH)
    before = module(x)
    given = {name: torch.zeros_like(one) for name, one in module.named_parameters()}
    assert not torch.func.functional_call(module, given, (x,)).any()
    assert torch.equal(module(x), before)
