"""IA³: one trained factor for each output of a layer, `l ∘ (W·x + b)`, or for each input of a feedforward
layer, `W·(l ∘ x) + b`.

Liu et al. 2022, https://arxiv.org/abs/2205.05638.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftrs.bases.kinds import CONVOLUTIONS, Affine, LayerKind, LayerSpec
from peftrs.bases.sharded import everywhere
from peftrs.config import PeftType, TargetedConfig
from peftrs.core.method import Adapter, Scaling, Side, Slots
from peftrs.registry import register

FACTORS = "ia3_l"


@dataclass
class IA3Config(TargetedConfig):
    """The settings of an IA³ adapter: PEFT's names, defaults and file format.

    The layers that `feedforward_modules` names have their inputs scaled, all others their outputs.
    """

    feedforward_modules: str | list[str] | set[str] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.IA3
        if isinstance(self.feedforward_modules, (list, tuple, frozenset)):
            self.feedforward_modules = set(self.feedforward_modules)
        super().__post_init__()


@register
class Ia3(Scaling):
    """One vector a layer, of ones at first."""

    name = "IA3"
    config = IA3Config
    prefix = "ia3_"
    layers = frozenset({LayerKind.LINEAR, LayerKind.CONV2D, LayerKind.CONV3D})
    parallel = True

    def settle(self, config: IA3Config, spec: LayerSpec) -> dict[str, Any]:
        feedforward = bool(spec.matched.get("feedforward_modules", False))
        return {"side": Side.INPUT if feedforward else Side.OUTPUT}

    def slots(self, config: IA3Config, spec: LayerSpec, values: dict[str, Any]) -> Slots:
        inputs = values["side"] is Side.INPUT
        channels = spec.in_features if inputs else spec.out_features
        if spec.kind in CONVOLUTIONS:
            return {FACTORS: (1, channels, *[1] * (len(spec.shape) - 2))}
        return {FACTORS: (1, channels) if inputs else (channels, 1)}

    def init(self, adapter: Adapter, base: Affine) -> None:
        nn.init.ones_(adapter[FACTORS]) if adapter.config.init_ia3_weights else nn.init.normal_(
            adapter[FACTORS]
        )

    def side_of(self, adapter: Adapter) -> Side:
        side: Side = adapter.values["side"]
        return side

    def vector(self, adapter: Adapter) -> Tensor:
        return everywhere(adapter[FACTORS]).flatten()
