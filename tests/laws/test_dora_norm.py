"""DoRA's norm is that of the dense weight, found without a second tensor of the weight's size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peftrs.methods.lora import LoraConfig, product
from peftrs.methods.lora.dora import Dora
from tests.laws.cases import WAYS, adapted, add, distance, fitted, seeds, sole_layer
from tests.ops.accounting import Largest

# How far the identity may lie from the norm of the dense weight, relative to it.
NORM_TOLERANCE = 2e-6


@pytest.mark.parametrize("kind", WAYS["dora"].kinds)
@settings(max_examples=10)
@given(seed=seeds, scaling=st.floats(-4, 4))
def test_the_identity_gives_the_norm_of_the_dense_weight(kind: str, seed: int, scaling: float) -> None:
    torch.manual_seed(seed)
    model = adapted(["dora"], kind)
    adapter = next(fitted(model))
    adapter.scaling = scaling
    base = sole_layer(model).base.dense(sole_layer(model).base_layer)
    up, down = (factor.double() for factor in product(adapter)[:2])
    dense = (base.weight.double().flatten(1) + scaling * up @ down).norm(dim=1)
    assert distance(Dora().norm(adapter, base.weight), dense) < NORM_TOLERANCE


@settings(max_examples=10)
@given(seed=seeds, smallness=st.integers(0, 7))
def test_rows_that_cancel_keep_a_norm_near_zero(seed: int, smallness: int) -> None:
    """`‖W‖² + …` loses half the digits where `s·B·A` nearly takes `W` away; what is left must not be lost or
    negative.
    """
    torch.manual_seed(seed)
    model = adapted(["dora"], "linear")
    adapter = next(fitted(model))
    with torch.no_grad():
        up, down = product(adapter)[:2]
        weight = -adapter.scaling * (up @ down) + 10.0**-smallness * torch.randn(10, 6)
        norm = Dora().norm(adapter, weight)
        dense = (weight.double() + adapter.scaling * up.double() @ down.double()).norm(dim=1)
    assert bool(norm.isfinite().all())
    assert bool((norm >= 0).all())
    assert float((norm - dense).abs().max()) <= 1e-3 * float(weight.norm(dim=1).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_makes_no_tensor_of_the_weights_size(dtype: torch.dtype) -> None:
    out, width, tokens = 1536, 1280, 3
    model = nn.Sequential(nn.Linear(width, out)).to(dtype)
    add(model, LoraConfig(target_modules=["0"], r=4, use_dora=True), "a")
    x = torch.randn(tokens, width).to(dtype)
    with Largest() as largest:
        model(x).square().sum().backward()
    assert 0 < largest.elements < out * width
