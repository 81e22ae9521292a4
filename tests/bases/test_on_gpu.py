"""The same laws on a GPU, where there is one, with the kernels that a CPU does not have."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from peftrs import LoraConfig, get_peft_model
from peftrs.bases.resolve import resolve
from peftrs.core.fold import fold
from tests.bases.formats import ELSEWHERE, FORMATS, library

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WIDTH, OUT = 256, 128


def int4(dense: nn.Linear) -> nn.Module:
    """torchao's int4 tensors, packed for CUDA's kernel."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    holder = nn.Sequential(dense.to("cuda", torch.bfloat16))
    quantize_(holder, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return holder[0]


def float8(dense: nn.Linear) -> nn.Module:
    """torchao's float8 tensors with inputs rounded as they come."""
    pytest.importorskip("torchao")
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    holder = nn.Sequential(dense.to("cuda", torch.bfloat16))
    quantize_(holder, Float8DynamicActivationFloat8WeightConfig())
    return holder[0]


def transformer_engine(dense: nn.Linear) -> nn.Module:
    """Transformer Engine's linear layer."""
    pytest.importorskip("transformer_engine")
    from transformer_engine.pytorch import Linear

    layer = Linear(dense.in_features, dense.out_features, params_dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        layer.weight.copy_(dense.weight)
        layer.bias.copy_(dense.bias)
    return layer


def eetq(dense: nn.Linear) -> nn.Module:
    """EETQ's linear layer."""
    pytest.importorskip("eetq")
    from eetq.modules.qlinear import W8A16Linear

    return W8A16Linear.from_torch(dense.half().cuda())


HERE: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "torchao-int4": int4, "torchao-float8": float8, "transformer-engine": transformer_engine, "eetq": eetq,
}  # fmt: skip


def moved(name: str) -> nn.Module:
    """A layer of a format on the GPU."""
    dense = nn.Linear(WIDTH, OUT)
    if name in HERE:
        return HERE[name](dense)
    pytest.importorskip(ELSEWHERE[name][0] if name in ELSEWHERE else library(name))
    layer = (ELSEWHERE[name][1] if name in ELSEWHERE else FORMATS[name])(dense)
    return layer.cuda("cuda") if name.startswith("hqq") else layer.to("cuda")


@pytest.mark.parametrize("name", sorted({*FORMATS, *ELSEWHERE, *HERE}))
def test_forward_and_gradients_are_those_of_the_weights(name: str) -> None:
    model: Any = get_peft_model(
        nn.Sequential(moved(name)), LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    )
    layer = model.base_model.model[0]
    base = resolve(layer.base_layer)
    assert base is layer.base
    dtype = torch.float16 if name in ("eetq", "bnb-int8", "gptq", "awq") else torch.bfloat16
    dtype = torch.float32 if name.startswith("hqq") else dtype
    x = torch.randn(64, WIDTH, device="cuda", dtype=dtype, requires_grad=True)
    y = model(x)
    y.float().square().mean().backward()
    found = [x.grad, *(one.grad for one in model.parameters() if one.requires_grad)]
    x.grad = None
    model.zero_grad()
    weight, bias = fold(layer.chain(layer.active_adapters), base.dense(layer.base_layer))
    other: Tensor = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    other.square().mean().backward()
    expected = [x.grad, *(one.grad for one in model.parameters() if one.requires_grad)]
    for one, true in zip([y, *found], [other, *expected], strict=True):
        assert float((one.float() - true.float()).norm() / true.float().norm()) < 0.05


def test_merging_on_a_gpu_and_moving_back() -> None:
    pytest.importorskip("bitsandbytes")
    model: Any = get_peft_model(
        nn.Sequential(moved("bnb-nf4")), LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    )
    layer = model.base_model.model[0]
    before = layer.base_layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="of the update is left"):
        model.merge_adapter()
    model.to("cpu")
    model.to("cuda")
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
