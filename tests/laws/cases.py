"""What the laws range over: methods, kinds of layers, dtypes, and models of one adapted layer made from
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftrs import registry
from peftrs.config import TargetedConfig
from peftrs.core import inject, tree
from peftrs.core.layer import AdaptedLayer
from peftrs.core.slots import FittedAdapter
from peftrs.core.tree import adapted_layers
from peftrs.methods.ia3 import IA3Config
from peftrs.methods.lora import LoraConfig
from peftrs.methods.oft import OFTConfig
from peftrs.planning import targets as plan

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""How far two views of one adapted layer may lie apart, as ‖difference‖ / ‖output‖: four units of rounding of
a narrow dtype.
"""

dtypes = strategies.sampled_from(list(TOLERANCE))
seeds = strategies.integers(0, 2**32 - 1)


class Sole(nn.Module):
    """A model of one layer, which it calls with its own inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.layer(*inputs)
        return output[0] if isinstance(output, tuple) else output


class Projection(nn.Module):
    """A bare parameter `(out, in)` that the module's own forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ self.weight.mT


class Experts(nn.Module):
    """A stack of experts, `(experts, out, in)`, or `(experts, in, out)` where `is_transposed` says so."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(3, 6, 10) if is_transposed else torch.randn(3, 10, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo", x, self.weight if self.is_transposed else self.weight.mT)


@dataclass(frozen=True)
class Kind:
    """A kind of layer: how to make one, and the shape of its input (of three equal ones for attention)."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    copies: int = 1

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if self.shape == ():
            return (torch.randint(0, 11, (2, 5)),)
        return (torch.randn(self.shape).to(dtype),) * self.copies


KINDS = {
    "linear": Kind(lambda: nn.Linear(6, 10), (2, 5, 6)),
    "linear-unbiased": Kind(lambda: nn.Linear(6, 10, bias=False), (5, 6)),
    "transposed": Kind(lambda: Conv1D(10, 6), (2, 5, 6)),
    "embedding": Kind(lambda: nn.Embedding(11, 6), ()),
    "conv1d": Kind(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": Kind(lambda: nn.Conv2d(4, 6, (3, 2), padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "conv2d-pointwise": Kind(lambda: nn.Conv2d(6, 4, 1, bias=False), (2, 6, 3, 3)),
    "conv2d-grouped": Kind(lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv3d": Kind(lambda: nn.Conv3d(2, 4, 2), (1, 2, 3, 3, 3)),
    "attention": Kind(lambda: nn.MultiheadAttention(8, 2, batch_first=True), (2, 5, 8), copies=3),
    "parameter": Kind(Projection, (5, 6)),
    "experts": Kind(lambda: Experts(is_transposed=False), (5, 6)),
    "experts-transposed": Kind(lambda: Experts(is_transposed=True), (5, 6)),
}
BARE = ("parameter", "experts", "experts-transposed")
LINEAR = ("linear", "linear-unbiased", "transposed")
CONVOLUTIONS = ("conv1d", "conv2d", "conv2d-pointwise", "conv3d")


@dataclass(frozen=True)
class Way:
    """A method with its settings, and the kinds of layers that it is for."""

    config: type[TargetedConfig]
    settings: dict[str, Any]
    kinds: tuple[str, ...]
    neutral: bool = True
    """Whether its start promises to change nothing."""


LORA = {"r": 2, "lora_alpha": 3}
OFT = {"oft_block_size": 3}  # blocks of two turn in a plane, where no order of two adapters would show
ALL = (*LINEAR, "embedding", *CONVOLUTIONS, "attention", *BARE)
TURNED = (*LINEAR, "embedding", "conv2d", "conv2d-pointwise")
SCALED = (*LINEAR, "conv2d", "conv2d-pointwise", "conv2d-grouped", "conv3d")

WAYS = {
    "lora": Way(LoraConfig, LORA, ALL),
    "lora-rs": Way(
        LoraConfig,
        {**LORA, "use_rslora": True, "init_lora_weights": "gaussian"},
        ("linear", "embedding", "conv2d", "experts"),
    ),
    "lora-random": Way(
        LoraConfig,
        {**LORA, "init_lora_weights": False},
        ("linear", "embedding", "conv1d", "experts"),
        neutral=False,
    ),
    "lora-bias": Way(
        LoraConfig, {**LORA, "lora_bias": True}, ("linear", "transposed", "conv1d", "conv2d", "conv3d")
    ),
    "pissa": Way(LoraConfig, {**LORA, "init_lora_weights": "pissa"}, LINEAR),
    "pissa-niter": Way(LoraConfig, {**LORA, "init_lora_weights": "pissa_niter_2"}, ("linear",)),
    "olora": Way(LoraConfig, {**LORA, "init_lora_weights": "olora"}, LINEAR),
    "orthogonal": Way(
        LoraConfig, {**LORA, "init_lora_weights": "orthogonal"}, (*LINEAR, "attention", "parameter")
    ),
    "dora": Way(LoraConfig, {**LORA, "use_dora": True}, (*LINEAR, "embedding", *CONVOLUTIONS)),
    "ia3-outputs": Way(IA3Config, {"feedforward_modules": []}, SCALED),
    "ia3-inputs": Way(IA3Config, {"feedforward_modules": ["layer"]}, SCALED),
    "oft": Way(OFTConfig, OFT, TURNED),
    "oft-r": Way(OFTConfig, {"r": 2, "oft_block_size": 0, "num_cayley_neumann_terms": 3}, TURNED),
    "oft-shared": Way(OFTConfig, {**OFT, "block_share": True}, ("linear", "embedding", "conv2d")),
    "oft-constrained": Way(OFTConfig, {**OFT, "coft": True, "eps": 0.4}, ("linear", "embedding", "conv2d")),
    "oft-cayley": Way(OFTConfig, {**OFT, "use_cayley_neumann": False}, ("linear", "transposed", "embedding")),
    "oft-random": Way(OFTConfig, {**OFT, "init_weights": False}, ("linear",), neutral=False),
}

CASES = [(way, kind) for way, its in WAYS.items() for kind in its.kinds]
WAYS_FOR = {kind: [way for way, its in WAYS.items() if kind in its.kinds] for kind in KINDS}


def ids(case: Sequence[str]) -> str:
    return " on ".join(case)


def config(way: str, kind: str) -> TargetedConfig:
    target = {"target_parameters": ["layer.weight"]} if kind in BARE else {"target_modules": ["layer"]}
    return WAYS[way].config(**WAYS[way].settings, **target)


def add(model: nn.Module, settings: TargetedConfig, adapter: str, **options: Any) -> None:
    """Injects an adapter as the model room does, straight through the core."""
    assert settings.peft_type is not None
    planned = plan.make(list(tree.places(model)), settings, registry.method(settings.peft_type))
    inject.inject(model, settings, adapter, planned, inject.activation(model), **options)


def plain(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model before it is adapted, in eval mode."""
    return Sole(KINDS[kind].make()).to(dtype).eval()


def adapted(
    ways: Sequence[str],
    kind: str,
    dtype: torch.dtype = torch.float32,
    *,
    stirred: bool = True,
    **options: Any,
) -> nn.Module:
    """A model with one adapter a way, named "a", "b" and so on; the first is active."""
    model = plain(kind, dtype)
    for name, way in zip("abc", ways, strict=False):
        add(model, config(way, kind), name, **options)
    if stirred:
        stir(model)
    return model.eval()


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Moves every adapter away from where it started, as training does."""
    for adapter in fitted(model):
        for _, parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=0.3)


def fitted(model: nn.Module) -> Iterator[FittedAdapter]:
    for layer in adapted_layers(model):
        yield from layer.adapters.values()


def sole_layer(model: nn.Module) -> AdaptedLayer:
    """The layer that the model was made of, adapted."""
    layer = model.get_submodule("layer")
    assert isinstance(layer, AdaptedLayer)
    return layer


def distance(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖, in float64."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


def bits(model: nn.Module) -> dict[str, Tensor]:
    """The bit patterns of all weights that are not an adapter's, by the names they had before they were
    adapted.
    """
    own = {
        id(parameter) for adapter in fitted(model) for slot in adapter.places for parameter in [adapter[slot]]
    }
    integers = {2: torch.int16, 4: torch.int32}
    return {
        name.replace("base_layer.", ""): parameter.detach().clone().view(integers[parameter.element_size()])
        for name, parameter in model.named_parameters()
        if id(parameter) not in own
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )
