"""Adapters over quantized layers: the same laws for every format, with the libraries themselves."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from peftrs import (
    ConfigError,
    IA3Config,
    LoraConfig,
    MergeError,
    OFTConfig,
    PeftModel,
    PeftrsWarning,
    get_peft_model,
)
from peftrs.bases.kinds import Affine
from peftrs.bases.resolve import resolve
from peftrs.core import merge as merging
from peftrs.core.fold import fold
from peftrs.core.layer import AdaptedLayer
from peftrs.errors import set_strict
from tests.bases.formats import FORMATS, OUT, WIDTH, library

METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=["below", "above"]),
    "dora": lambda: LoraConfig(r=4, target_modules=["below", "above"], use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["below", "above"], feedforward_modules=["above"]),
    "oft": lambda: OFTConfig(oft_block_size=8, target_modules=["below", "above"]),
}


class Two(nn.Module):
    """One quantized layer over another, the upper one with the lower one's gradient to give."""

    def __init__(self, quantize: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.below = quantize(nn.Linear(WIDTH, WIDTH))
        self.above = quantize(nn.Linear(WIDTH, OUT))

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.below(x))


def adapted(name: str, config: Any, size: float = 0.1) -> tuple[PeftModel, AdaptedLayer, AdaptedLayer]:
    """The model with an adapter whose tensors are not at their first values, and its layers."""
    pytest.importorskip(library(name))
    model = get_peft_model(Two(FORMATS[name]), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    inner: Any = model.base_model.model
    return model, inner.below, inner.above


def state(module: nn.Module) -> bytes:
    """All that a layer stores."""
    return pickle.dumps({name: _plain(value) for name, value in module.state_dict().items()})


def _plain(value: Any) -> Any:
    held = [
        getattr(value, name)
        for name in ("qdata", "scale", "zero_point")
        if isinstance(getattr(value, name, None), Tensor)
    ]
    return [one.float().tolist() for one in held or [value]] if isinstance(value, Tensor) else value


def roughly(name: str) -> float:
    """How far the library's own forward may be from its dequantized weights: it rounds the inputs too in some
    formats.
    """
    return 0.1 if "dynamic" in name else 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FORMATS)
def test_forward_and_gradients_are_those_of_the_weights(name: str, method: str) -> None:
    model, below, above = adapted(name, METHODS[method]())
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    y = model(x)
    y.square().mean().backward()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    first = x.grad
    assert first is not None
    gradients = {key: parameter.grad for key, parameter in trained.items()}
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
    x.grad = None
    model.zero_grad()
    inside = x
    for layer in (below, above):
        inside = _dense(layer, inside)
    inside.square().mean().backward()
    near = {"rtol": roughly(name), "atol": roughly(name) * float(inside.detach().abs().max())}
    torch.testing.assert_close(y, inside, **near)
    scale = float(x.grad.abs().max())
    torch.testing.assert_close(first, x.grad, rtol=roughly(name), atol=2 * roughly(name) * scale)
    for key, parameter in trained.items():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            gradients[key], parameter.grad, rtol=roughly(name), atol=2 * roughly(name) * scale, msg=key
        )


def _dense(layer: AdaptedLayer, x: Tensor) -> Tensor:
    return functional.linear(x, *fold(layer.chain(layer.active_adapters), layer.base.dense(layer.base_layer)))


def _folded(layer: AdaptedLayer) -> Tensor:
    """The weight with the adapter in it, without what is merged."""
    weight, *bias = merging.originals(layer.frozen)
    return fold(layer.chain(layer.active_adapters), Affine(weight, *bias)).weight.detach()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FORMATS)
def test_unmerging_restores_what_was_stored(name: str, method: str) -> None:
    model, below, above = adapted(name, METHODS[method](), 0.3)
    model.eval()
    first = [state(layer.base_layer) for layer in (below, above)]
    with pytest.warns(PeftrsWarning, match="of the update is left"):
        model.merge_adapter()
    for layer in (below, above):
        undo = layer.frozen.ledger.undo
        asked, stored, then = (
            _folded(layer),
            *(layer.base.dense(one).weight for one in (layer.base_layer, undo.module)),
        )
        # The new layer is nearer to what the merge asked for than the old one is, by what the report says.
        error = float((stored - asked).norm() / (asked - then).norm())
        assert error < 1
        assert error == pytest.approx((undo.loss.missed / undo.loss.asked) ** 0.5, rel=1e-3, abs=1e-6)
        assert 0.5 < undo.loss.kept < 1.5
        assert undo.bytes > 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.unmerge_adapter()
    assert [state(layer.base_layer) for layer in (below, above)] == first


@pytest.mark.parametrize("name", FORMATS)
def test_merging_in_16_bits_rounds_once(name: str) -> None:
    model, below, above = adapted(name, METHODS["lora"](), 0.01)
    expected = [_folded(layer).to(torch.bfloat16) for layer in (below, above)]
    inner = model.merge_and_unload(dtype=torch.bfloat16)
    for layer, weight in zip((inner.below, inner.above), expected, strict=True):
        assert type(layer) is nn.Linear
        assert layer.weight.dtype is layer.bias.dtype is torch.bfloat16
        assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("name", FORMATS)
def test_a_merge_that_would_round_the_update_away_is_refused(name: str) -> None:
    model, below, above = adapted(name, METHODS["lora"](), 1e-5)
    first = [state(layer.base_layer) for layer in (below, above)]
    with pytest.raises(MergeError, match=r"rounds the update away; hint: merge_and_unload\(dtype"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="rounds the update away"):
        model.merge_and_unload()
    assert not below.merged
    assert [state(layer.base_layer) for layer in (below, above)] == first
    set_strict(False)
    try:
        with pytest.warns(PeftrsWarning, match="rounds the update away"):
            model.merge_adapter()
    finally:
        set_strict(True)
    assert below.merged


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-nf4-double", "bnb-fp4"])
def test_eval_does_not_pack_4_bit_weights(name: str) -> None:
    """On CPUs with AVX512-BF16 the library packs in eval, which loses bits and gradients."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = Two(FORMATS[name])
    dense = [
        bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for layer in (model.below, model.above)
    ]
    x = torch.randn(40, WIDTH)
    model.eval()
    with torch.no_grad():
        plain = model(x)
    peft = get_peft_model(model, METHODS["lora"]())
    for layer, weight in zip((model.below, model.above), dense, strict=True):
        now = layer.base.dense(layer.base_layer).weight
        torch.testing.assert_close(now, weight, rtol=0.02, atol=0.01 * float(weight.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(peft.eval()(x), plain, rtol=0.05, atol=0.05)
    peft.train()
    peft(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", FORMATS)
def test_copies_and_names(name: str) -> None:
    model, below, _ = adapted(name, METHODS["lora"]())
    base = resolve(below.base_layer)
    assert base is below.base
    assert base.quantized
    assert base.shape(below.base_layer) == tuple(base.dense(below.base_layer).weight.shape) == (WIDTH, WIDTH)
    other = copy.deepcopy(model)
    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("name", ["bnb-nf4", "torchao-int8-dynamic"])
def test_gradients_pass_through_layers_that_are_not_adapted(name: str) -> None:
    pytest.importorskip(library(name))
    model = Two(FORMATS[name]).eval()
    peft: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["below"], init_lora_weights=False))
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        peft(x)
    peft(x).sum().backward()
    layer = peft.base_model.model.below
    weight = (
        model.above.weight.dequantize()
        if name.startswith("torchao")
        else resolve(model.above).dense(model.above).weight
    )
    expected = (
        layer.scaling["default"] * weight.sum(0)[:, None] * (x @ layer.lora_A["default"].weight.mT).sum(0)
    ).detach()
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_quantized_embeddings_are_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bitsandbytes.nn.Embedding8bit(16, 64).to("cpu"))
    with pytest.raises(ConfigError, match="Embedding8bit"):
        get_peft_model(model, LoraConfig(target_modules=["0"]))


def test_layers_with_scales_that_nothing_here_reads_are_refused() -> None:
    class FP8Linear(nn.Linear):
        """transformers' layer of block-wise float8, as far as its parameters go."""

        def __init__(self) -> None:
            super().__init__(128, 128)
            self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
            self.weight_scale_inv = nn.Parameter(torch.ones(1, 1))

    with pytest.raises(ConfigError, match="FP8Linear"):
        get_peft_model(nn.Sequential(FP8Linear()), LoraConfig(target_modules=["0"]))


def test_importing_bases_imports_no_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys, peftrs.bases.resolve, peftrs.core.manage; print({'bitsandbytes', 'hqq', 'torchao'} &"
        " set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
