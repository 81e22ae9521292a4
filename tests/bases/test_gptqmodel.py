"""GPTQ and AWQ with gptqmodel itself, and AQLM with its own package, where they are installed: their kernels for CPUs."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from peftrs import LoraConfig, MergeError, get_peft_model
from peftrs.bases.resolve import resolve
from peftrs.core.layer import fold

WIDTH, OUT, GROUP = 128, 64, 32


def packed(kind: Any, dense: nn.Linear, **options: Any) -> nn.Module:
    """A layer of gptqmodel with this one's weight on a grid of 4 bits a group."""
    settings = {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": False, "in_features": WIDTH, "out_features": OUT}
    layer = kind(**settings, bias=True, pack_dtype=torch.int32, **options)
    groups = dense.weight.detach().reshape(OUT, WIDTH // GROUP, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    scales = (high - low) / 15
    zeros = torch.round(-low / scales)
    layer.pack(dense, scales, zeros, torch.arange(WIDTH, dtype=torch.int32) // GROUP)
    layer.post_init()
    return layer


def gptq(dense: nn.Linear) -> nn.Module:
    """gptqmodel's kernel in plain torch."""
    pytest.importorskip("gptqmodel", exc_type=ImportError)
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    # Compiling the dequantization takes longer than all else here.
    TorchLinear.optimize = lambda *_, **__: None
    return packed(TorchLinear, dense)


def awq(dense: nn.Linear) -> nn.Module:
    """gptqmodel's kernel for AWQ in plain torch."""
    pytest.importorskip("gptqmodel", exc_type=ImportError)
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    return packed(AwqTorchLinear, dense)


def aqlm(dense: nn.Linear) -> nn.Module:
    """AQLM with random codes."""
    pytest.importorskip("aqlm")
    from aqlm import QuantizedLinear

    layer = QuantizedLinear(WIDTH, OUT, 8, 1, 1, 16, dtype=torch.float32)
    with torch.no_grad():
        layer.codes.copy_(torch.randint(-(2**15), 2**15, layer.codes.shape))
        layer.codebooks.normal_(std=0.1)
        layer.scales.fill_(1)
        layer.bias.copy_(dense.bias)
    return layer


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantize", [gptq, awq, aqlm])
def test_the_library_itself(quantize: Any, dora: bool) -> None:
    dense = nn.Linear(WIDTH, OUT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = quantize(dense)
    model: Any = get_peft_model(Holder(inner), LoraConfig(r=4, target_modules=["layer"], use_dora=dora))
    layer = model.base_model.model.layer
    base = resolve(inner)
    assert base is layer.base
    weight, _ = base.dense(inner)
    if quantize is not aqlm:
        torch.testing.assert_close(weight.float(), dense.weight.detach(), rtol=0, atol=0.02)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    dtype = torch.float32 if quantize is aqlm else torch.bfloat16
    x = torch.randn(16, WIDTH, dtype=dtype, requires_grad=True)
    y = model(x)
    y.float().square().sum().backward()
    first = x.grad
    x.grad = None
    affine = fold(layer.chain(layer.active_adapters), base.dense(inner))
    other = functional.linear(x.float(), affine.weight.float(), affine.bias.float())
    other.square().sum().backward()
    near = 1e-4 if quantize is aqlm else 2e-2
    torch.testing.assert_close(y.float(), other, rtol=near, atol=near * float(other.detach().abs().max()))
    torch.testing.assert_close(first.float(), x.grad.float(), rtol=near, atol=near * float(x.grad.abs().max()))
    with pytest.raises(MergeError, match="calibration alone"):
        model.merge_adapter()
    merged = model.merge_and_unload(dtype=torch.bfloat16)
    assert torch.equal(merged.layer.weight, affine.weight.to(torch.bfloat16))
