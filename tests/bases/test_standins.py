"""Layers of libraries that need a GPU, by stand-ins whose names are those of the published classes."""

import inspect
import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from peftrs import IA3Config, LoraConfig, MergeError, OFTConfig, get_peft_model
from peftrs.bases.resolve import resolve
from peftrs.core.fold import fold
from tests.bases.standins import OUT, PUBLISHED, RECORD, STANDINS, WIDTH, place

METHODS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["layer"]),
    "dora": lambda: LoraConfig(r=4, target_modules=["layer"], use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["layer"], feedforward_modules=[]),
    "oft": lambda: OFTConfig(oft_block_size=8, target_modules=["layer"]),
}
AFFINE = [name for name in STANDINS if name not in ("te-norm", "te-mlp")]

place()


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = STANDINS[name]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def adapted(name: str, method: str) -> tuple[Any, Any]:
    """The model with an adapter that is not at its first values, and its layer."""
    model = get_peft_model(Holder(name), METHODS[method]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, model.base_model.model.layer


@pytest.mark.parametrize("name", PUBLISHED)
def test_stand_ins_have_published_names_only(name: str) -> None:
    record = json.loads(RECORD.read_text())[name]
    assert record["class"] == f"{PUBLISHED[name].file}: {PUBLISHED[name].kind}"
    assert record["missing"] == []
    assert record["names"] == sorted(PUBLISHED[name].names)
    standin = STANDINS[name]()
    own = {
        *standin._parameters,
        *standin._buffers,
        *(key for key in vars(standin) if not key.startswith("_")),
    }
    shown = {
        key for kind in type(standin).__mro__ if kind.__module__.endswith(".stand_in") for key in vars(kind)
    }
    helpers = {"training", "forward", "true", "stored", "scaled", "dense", "call_super_init"}
    split = {f"{part}_{kind}" for part in ("query", "key") for kind in ("weight", "bias")}
    first = {"fc1_weight", "weight"} if name in ("te-mlp", "te-norm") else set()
    more = own | {key for key in shown if not key.startswith("_")}
    assert more - helpers - split - first <= set(record["names"]) | {"bias", "in_features", "out_features"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_is_read_that_the_published_class_lacks(name: str) -> None:
    """Each name that the base finds on the layer is in the class's own source, or its bias."""
    record = json.loads(RECORD.read_text())[name]
    kind, read, running = STANDINS[name], set(), []

    class Spied(kind):
        def __getattribute__(self, asked: str) -> Any:
            if not running:
                read.add(asked)
            return super().__getattribute__(asked)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            running.append(self)
            try:
                return kind.forward(self, x)
            finally:
                running.pop()

    Spied.__name__, Spied.__module__ = kind.__name__, kind.__module__
    layer = Spied()
    read.clear()
    base = resolve(layer)
    base.prepare(layer)
    (
        base.format(layer),
        base.shape(layer),
        base.parameters(layer),
        base.differentiable(layer),
        base.obstacle(layer),
    )
    if name in AFFINE:
        base.dense(layer), base.dtype(layer)
    theirs = set(dir(nn.Module())) | {"__dict__", "__class__", "_buffers", "_parameters", "_modules"}
    split = {
        f"{part}_{kind}" for part in ("query", "key") for kind in ("weight", "bias")
    }  # of the published `weight_names`
    found = {asked for asked in read - theirs - split if hasattr(layer, asked)}
    assert found
    assert found <= set(record["names"]) | {"bias"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_layers_are_called_with_one_input(name: str) -> None:
    record = json.loads(RECORD.read_text())[name]
    assert len(record["called with"]) == 1
    assert len(inspect.signature(STANDINS[name]().forward).parameters) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", AFFINE)
def test_forward_gradients_and_merging_in_16_bits(name: str, method: str) -> None:
    model, layer = adapted(name, method)
    base = resolve(layer.base_layer)
    assert base is layer.base
    assert base.quantized
    weight, _ = base.dense(layer.base_layer)
    torch.testing.assert_close(weight.float(), layer.base_layer.true().float(), rtol=1e-3, atol=1e-4)
    assert base.shape(layer.base_layer) == (OUT, WIDTH)
    half = name == "eetq"
    x = torch.randn(2, 3, WIDTH).half() if half else torch.randn(2, 3, WIDTH)
    if name == "inc":
        x = x.to(torch.float8_e4m3fn).float()
    x.requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    first, trained = x.grad, [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    gradients = [parameter.grad for parameter in trained]
    x.grad = None
    model.zero_grad()
    affine = fold(layer.chain(layer.active_adapters), base.dense(layer.base_layer))
    other = functional.linear(
        x.float(), affine.weight.float(), None if affine.bias is None else affine.bias.float()
    )
    other.square().sum().backward()
    near = 2e-2 if half or name == "inc" else 1e-4
    # An input that is rounded in the layer, but not for the adapter beside it, lies apart from the weights'
    # own.
    loose = 0.1 if name == "inc" and method == "oft" else near
    torch.testing.assert_close(y.float(), other, rtol=loose, atol=loose * float(other.detach().abs().max()))
    torch.testing.assert_close(first, x.grad, rtol=loose, atol=loose * float(x.grad.abs().max()))
    for gradient, parameter in zip(gradients, trained, strict=True):
        torch.testing.assert_close(
            gradient, parameter.grad, rtol=loose, atol=loose * float(parameter.grad.abs().max())
        )
    with pytest.raises(MergeError, match=r"calibration alone; hint: merge_and_unload\(dtype"):
        model.merge_adapter()
    inner = model.merge_and_unload(dtype=torch.bfloat16)
    assert type(inner.layer) is nn.Linear
    assert torch.equal(inner.layer.weight, affine.weight.to(torch.bfloat16))
    assert torch.equal(inner.layer.bias, affine.bias.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["te-norm", "te-mlp"])
def test_a_norm_with_its_layer_trains_but_does_not_merge(name: str) -> None:
    model, layer = adapted(name, "lora")
    x = torch.randn(4, WIDTH)
    y = model(x)
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    adapter = layer.adapters["default"]
    up, down, *_ = adapter.method.term(adapter)
    torch.testing.assert_close(y, layer.base_layer(x) + adapter.scaling * x @ down.mT @ up.mT)
    with pytest.raises(MergeError, match="no affine map"):
        model.merge_and_unload(dtype=torch.bfloat16)
    assert model.base_model.model.layer is layer
