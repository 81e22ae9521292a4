"""GPTQ and AWQ with gptqmodel itself, and AQLM with its own package, where they are installed: their kernels
for CPUs.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from peftrs import LoraConfig, MergeError, get_peft_model
from peftrs.bases.resolve import resolve
from peftrs.core.fold import fold
from tests.bases.formats import ELSEWHERE

WIDTH, OUT = 128, 64


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_library_itself(name: str, dora: bool) -> None:
    pytest.importorskip(ELSEWHERE[name][0])
    dense = nn.Linear(WIDTH, OUT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = ELSEWHERE[name][1](dense)
    model: Any = get_peft_model(Holder(inner), LoraConfig(r=4, target_modules=["layer"], use_dora=dora))
    layer = model.base_model.model.layer
    base = resolve(inner)
    assert base is layer.base
    weight, _ = base.dense(inner)
    if name != "aqlm":
        torch.testing.assert_close(weight.float(), dense.weight.detach(), rtol=0, atol=0.02)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    dtype = torch.float32 if name == "aqlm" else torch.bfloat16
    x = torch.randn(16, WIDTH, dtype=dtype, requires_grad=True)
    y = model(x)
    y.float().square().sum().backward()
    first = x.grad
    x.grad = None
    affine = fold(layer.chain(layer.active_adapters), base.dense(inner))
    other = functional.linear(x.float(), affine.weight.float(), affine.bias.float())
    other.square().sum().backward()
    near = 1e-4 if name == "aqlm" else 2e-2
    torch.testing.assert_close(y.float(), other, rtol=near, atol=near * float(other.detach().abs().max()))
    torch.testing.assert_close(
        first.float(), x.grad.float(), rtol=near, atol=near * float(x.grad.abs().max())
    )
    with pytest.raises(MergeError, match="calibration alone"):
        model.merge_adapter()
    merged = model.merge_and_unload(dtype=torch.bfloat16)
    assert torch.equal(merged.layer.weight, affine.weight.to(torch.bfloat16))
