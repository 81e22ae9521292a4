"""OFT: the layer's input is turned by an orthogonal map of small blocks, `W·(R·x) + b`; an embedding's output
is, instead.

Qiu et al. 2023, https://arxiv.org/abs/2306.07280; the truncated series: Qiu et al. 2025,
https://arxiv.org/abs/2506.19847.

A block of `R` follows from the numbers above the diagonal of a skew matrix `Q` of the same size, by Cayley's
map or by the first terms of its series. Blocks are stored so that a row vector is turned by multiplying from
the right, `x·R`. Over a convolution the blocks lie along the patch, `in * kernel` features: only its weight
can be turned, not its input.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftrs.bases.kinds import Affine, LayerKind, LayerSpec
from peftrs.config import LayeredConfig, PeftType
from peftrs.core.method import Adapter, Below, Rotation, Slots
from peftrs.errors import ConfigError, PeftrsWarning
from peftrs.registry import register

SERIES_SINCE = (0, 18)
"""The first version of PEFT whose series ends as it does now, which is also the first that writes its
version.
"""

EARLY = (
    "an early version of PEFT wrote it, whose numbers mean another turn; train it again, or use it with that"
    " version"
)


@dataclass
class OFTConfig(LayeredConfig):
    """The settings of an OFT adapter: PEFT's names, defaults and file format.

    `r` blocks, or blocks of `oft_block_size`: one of the two, the other is 0. `module_dropout` is the share
    of blocks left out of a training step, which PEFT reads but never applies.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        self.peft_type = PeftType.OFT
        super().__post_init__()

    def check_file(self, values: dict[str, Any], origin: str) -> None:
        for name in ("oft_block_size", "use_cayley_neumann"):
            if name not in values:
                raise ConfigError(f"{origin}: has no `{name}`: {EARLY}")
        version = str(values.get("peft_version"))
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if self.use_cayley_neumann and (numbers is None or (int(numbers[1]), int(numbers[2])) < SERIES_SINCE):
            raise ConfigError(
                f"{origin}: `peft_version` is {version} and not 0.18 or later, when the series changed:"
                f" {EARLY}"
            )


@register
class Oft(Rotation):
    """Blocks that start as the identity."""

    name = "OFT"
    config = OFTConfig
    prefix = "oft_"
    attributes = ("r", "oft_block_size")
    layers = frozenset({LayerKind.LINEAR, LayerKind.CONV2D, LayerKind.EMBEDDING})

    def settle(self, config: OFTConfig, spec: LayerSpec) -> dict[str, Any]:
        if spec.groups > 1:
            raise ConfigError(
                f"OFT would turn features across {spec.groups} groups of channels; leave this layer out"
            )
        features = spec.out_features if spec.kind is LayerKind.EMBEDDING else math.prod(spec.shape[1:])
        wanted = config.r or config.oft_block_size
        number = _nearest_divisor(features, wanted)
        if number != wanted:
            field = "r" if config.r else "oft_block_size"
            message = f"{spec.name}: {field}={wanted} does not divide {features} features; {number} is used"
            warnings.warn(message, PeftrsWarning, stacklevel=4)
        blocks, size = (number, features // number) if config.r else (features // number, number)
        return {"r": blocks, "oft_block_size": size}

    def slots(self, config: OFTConfig, spec: LayerSpec, values: dict[str, Any]) -> Slots:
        size = values["oft_block_size"]
        return {_slot(spec): (1 if config.block_share else values["r"], size * (size - 1) // 2)}

    def init(self, adapter: Adapter, base: Affine) -> None:
        weight = adapter[_slot(adapter.spec)]
        nn.init.zeros_(weight) if adapter.config.init_weights else nn.init.normal_(weight, std=0.1)

    def turn(self, adapter: Adapter, x: Tensor, *, transpose: bool = False, training: bool = False) -> Tensor:
        dtype = torch.promote_types(x.dtype, adapter[_slot(adapter.spec)].dtype)
        blocks = self.blocks(adapter, torch.promote_types(dtype, torch.float32), training).to(dtype)
        parts = x.to(dtype).reshape(*x.shape[:-1], -1, blocks.shape[-1])
        blocks = (blocks.mT if transpose else blocks).expand(parts.shape[-2], -1, -1)
        turned: Tensor = torch.einsum("...rk,rkc->...rc", parts, blocks)
        return turned.flatten(-2)

    def forward(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        above = adapter[_slot(adapter.spec)]
        if adapter.config.coft and below.training and above.requires_grad:
            # Projected gradient descent: the optimizer steps on from within the bounds, not from where it
            # left them.
            with torch.no_grad():
                above.mul_(self.within_bounds(adapter, above))
        return super().forward(adapter, x, below)

    def blocks(self, adapter: Adapter, dtype: torch.dtype, training: bool = False) -> Tensor:
        """The blocks of `R`, `(r, size, size)`, or the one that all share, `(1, size, size)`."""
        config, size = adapter.config, adapter.values["oft_block_size"]
        above = adapter[_slot(adapter.spec)].to(dtype)
        if config.coft:
            above = above * self.within_bounds(adapter, above)
        rows, columns = torch.triu_indices(size, size, 1, device=above.device)
        upper = above.new_zeros(size * size, len(above), dtype=dtype)
        upper = upper.index_copy(0, rows * size + columns, above.mT).mT.reshape(-1, size, size)
        skew = upper - upper.mT
        blocks = (
            _series(skew, config.num_cayley_neumann_terms) if config.use_cayley_neumann else _cayley(skew)
        )
        dropped = int(config.module_dropout * len(blocks)) if training and len(blocks) > 1 else 0
        if dropped:
            left_out = torch.randperm(len(blocks), device=blocks.device) < dropped
            blocks = torch.where(left_out[:, None, None], _identity(blocks), blocks)
        return blocks

    @torch.no_grad()
    def within_bounds(self, adapter: Adapter, above: Tensor) -> Tensor:
        """The factor, at most 1, that brings each block's skew matrix within `eps / √blocks` of zero;
        `(blocks, 1)`.
        """
        lengths = math.sqrt(2) * torch.linalg.vector_norm(above, dim=1, keepdim=True)
        bound = adapter.config.eps / math.sqrt(len(above))
        return torch.clamp(bound / lengths, max=1)


def _slot(spec: LayerSpec) -> str:
    return "oft_embedding_R.weight" if spec.kind is LayerKind.EMBEDDING else "oft_R.weight"


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _cayley(skew: Tensor) -> Tensor:
    """`(I - Q)·(I + Q)⁻¹`, orthogonal up to rounding."""
    identity = _identity(skew)
    solved: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return solved


def _series(skew: Tensor, terms: int) -> Tensor:
    """`I + 2Q + 2Q² + … + Qⁿ⁻¹`, which ends like `(I + Q)·(I - Q)⁻¹` cut off: the inverse of what `_cayley`
    gives.

    Files hold numbers trained for exactly this: no last term of half weight for two terms, a third power for
    three.
    """
    blocks = _identity(skew).expand_as(skew)
    if terms > 1:
        blocks = blocks + 2 * skew
    if terms > 2:
        power = skew @ skew
        blocks = blocks + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            blocks = blocks + 2 * power
        blocks = blocks + power @ skew
    return blocks


def _nearest_divisor(features: int, wanted: int) -> int:
    """The divisor of `features` nearest to `wanted`; of two equally near the smaller."""
    wanted = min(wanted, features)
    nearby = (number for step in range(wanted) for number in (wanted - step, wanted + step))
    return next(number for number in nearby if features % number == 0)
