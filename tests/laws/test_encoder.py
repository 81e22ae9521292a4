"""torch's encoder runs fused in eval without gradients, reading weights past their modules: adapters act all
the same.
"""

import pytest
import torch
from torch import Tensor, nn

from peftrs.core import manage
from peftrs.core.tree import adapted_layers
from peftrs.methods.ia3 import IA3Config
from peftrs.methods.lora import LoraConfig
from peftrs.methods.oft import OFTConfig
from tests.laws.cases import add, distance, stir

CONFIGS = {
    "lora on the feedforward": LoraConfig(target_modules=["linear1", "linear2"], r=2),
    "lora on attention": LoraConfig(target_modules=["self_attn"], r=2),
    "lora on all": LoraConfig(target_modules=["self_attn", "linear1", "linear2"], r=2),
    "dora on the feedforward": LoraConfig(target_modules=["linear1", "linear2"], r=2, use_dora=True),
    "ia3": IA3Config(target_modules=["linear1", "linear2"], feedforward_modules=["linear2"]),
    "oft": OFTConfig(target_modules=["linear1", "linear2"], oft_block_size=4),
}
X = (3, 5, 8)
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


MODELS = {
    "layer": lambda: nn.ModuleDict({"one": layer()})["one"],
    "encoder": lambda: nn.TransformerEncoder(layer(), 2),
    "encoder with a norm": lambda: nn.TransformerEncoder(layer(), 2, norm=nn.LayerNorm(8)),
}


def fused(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        return model.eval()(x, src_key_padding_mask=mask)


def plainly(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """In training mode torch never takes the fused path; there is no dropout to tell the two apart."""
    return model.train()(x, src_key_padding_mask=mask)


@pytest.mark.parametrize("mask", [None, PADDED], ids=["unpadded", "padded"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_fused_path_sees_adapters(make, config, mask: Tensor | None) -> None:
    model, x = make(), torch.randn(X)
    kept = torch.ones(X[:2], dtype=torch.bool) if mask is None else ~mask
    bare = plainly(model, x, mask)
    add(model, config, "a")
    stir(model)
    expected = plainly(model, x, mask)
    assert distance(expected[kept], bare[kept]) > 0.01
    assert distance(fused(model, x, mask)[kept], expected[kept]) < 2e-6
    manage.merge(model)
    assert distance(fused(model, x, mask)[kept], expected[kept]) < 2e-6
    manage.unmerge(list(adapted_layers(model)))
    with manage.disabled(model):
        assert distance(fused(model, x, mask)[kept], bare[kept]) < 2e-6
    manage.unload(model, merged=True)
    assert distance(fused(model, x, mask)[kept], expected[kept]) < 2e-6


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("needs_weights", [True, False])
def test_attention_alone_sees_both_of_its_projections(grad: bool, needs_weights: bool) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
    x = torch.randn(X)
    add(model, LoraConfig(target_modules=["attention"], r=2), "a")
    with torch.set_grad_enabled(grad):
        fresh = model["attention"](x, x, x, need_weights=needs_weights)[0]
        projections = list(adapted_layers(model))
        assert len(projections) == 2
        outputs = [fresh]
        for projection in projections:
            with torch.no_grad():
                projection.adapters["a"]["lora_B.weight"].normal_()
            outputs.append(model["attention"](x, x, x, need_weights=needs_weights)[0])
            assert distance(outputs[-1], outputs[-2]) > 0.01
        manage.merge(model)
        assert distance(model["attention"](x, x, x, need_weights=needs_weights)[0], outputs[-1]) < 2e-6
