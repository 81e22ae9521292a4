"""DoRA: LoRA whose merged weight has rows of trained length, `m · (W + s·B·A) / ‖W + s·B·A‖`, the norm taken
row by row.

Liu et al. 2024, https://arxiv.org/abs/2402.09353; the norm is constant in the backward pass (section 4.3).
Rows are output features, output channels, or the columns of an embedding's table. The base's share of the
output takes the input before dropout, unlike PEFT, which runs the base a second time on the dropped input;
without dropout both agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftrs.bases.kinds import CONVOLUTIONS, Affine, LayerKind, LayerSpec, Term, along_channels
from peftrs.core.method import Adapter, Below, Method, Slots, path_of
from peftrs.errors import ConfigError
from peftrs.methods.lora import Lora, LoraConfig, product
from peftrs.ops import lora_linear
from peftrs.ops.strengths import strengthen
from peftrs.registry import register

MAGNITUDE = "lora_magnitude_vector"
SMALL = 2**15
"""The numbers of a weight up to which forming the changed one costs less than the host's part of not forming
it.
"""

ROWS = 256
"""Rows a block where the weight must be widened to take its norm, so that no wide copy of all of it
exists.
"""


@register
class Dora(Lora):
    """LoRA with `use_dora=True`; its configs and files are LoRA's."""

    name = "DORA"

    def variant(self, config: LoraConfig) -> Method:
        return self

    def settle(self, config: LoraConfig, spec: LayerSpec) -> dict[str, Any]:
        if spec.kind in (LayerKind.ATTENTION, LayerKind.PARAMETER):
            raise ConfigError(
                f"`use_dora` does not work on an {spec.kind} weight; leave this layer out or use plain LoRA"
            )
        return super().settle(config, spec)

    def slots(self, config: LoraConfig, spec: LayerSpec, values: dict[str, Any]) -> Slots:
        channels: tuple[int, ...] = (spec.out_features,)
        if spec.kind in CONVOLUTIONS:
            channels = (1, spec.out_features, *[1] * (len(spec.shape) - 2))
        return {**super().slots(config, spec, values), MAGNITUDE: channels}

    def init(self, adapter: Adapter, base: Affine) -> None:
        super().init(adapter, base)
        weight = self.rebase(adapter, base) if self.rebases(adapter.config) else base.weight
        adapter[MAGNITUDE].copy_(self.norm(adapter, weight).view_as(adapter[MAGNITUDE]))

    def term(self, adapter: Adapter) -> Term | None:
        return None

    def fused_term(self, adapter: Adapter) -> Term | None:
        return product(adapter)

    def apply(self, adapter: Adapter, affine: Affine) -> Affine:
        return self._lengthened(adapter, product(adapter), affine)

    def _lengthened(self, adapter: Adapter, term: Term, affine: Affine) -> Affine:
        weight = term.added(affine).weight
        lengths = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1)
        strength = adapter[MAGNITUDE].flatten().to(weight.dtype) / lengths
        return Affine(weight * strength.view(-1, *[1] * (weight.ndim - 1)), affine.bias)

    def forward(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        affine, term = below.dense(), product(adapter)
        if self._is_small(term, x, affine, below):
            return below.op(x, self._lengthened(adapter, term, affine))
        strength = adapter[MAGNITUDE].flatten() / self.norm(adapter, affine.weight)
        y = below.fused(x, term, biased=False)
        if y is not None:
            # The strengths start at one: what of them is rounded to a narrow dtype is their distance from it.
            y = strengthen(y, (strength - 1).to(y.dtype))
            return y if affine.bias is None else y + affine.bias.to(y.dtype)
        strength = along_channels(strength, adapter.spec)
        y = below(x)
        linear = y if affine.bias is None else y - along_channels(affine.bias, adapter.spec)
        change = (strength - 1) * linear + strength * adapter.scaling * path_of(term, adapter.spec, x, below)
        return (y + change).to(y.dtype)

    def _is_small(self, term: Term, x: Tensor, affine: Affine, below: Below) -> bool:
        """Whether so little is computed that the fewest operations are quickest: those of the weight view."""
        weight = affine.weight
        return (
            weight.ndim == 2
            and weight.numel() <= SMALL
            and weight.dtype is x.dtype
            and not (term.dropout and below.training)
            and not below.base.quantized
            and lora_linear.is_plain_small(x, weight, term.down, term.up)
            and below.obstacle() is None
        )

    @torch.no_grad()
    def norm(self, adapter: Adapter, weight: Tensor) -> Tensor:
        """The lengths of the rows of `W + s·B·A`, `(out,)`, without forming it.

        `‖W + sBA‖² = ‖W‖² + 2s·Σ (W Aᵀ) ∘ B + s²·Σ (B·A Aᵀ) ∘ B`, the sums over columns: one `(out, r)`
        product with the weight.
        """
        up, down, *_ = product(adapter)
        rows = weight.flatten(1)
        if adapter.spec.groups > 1:
            # No weight of the layer's shape does what these factors do. PEFT reads them as if one did, and
            # trains by its length.
            change = (up.reshape(-1, len(down)) @ down).view_as(rows)
            lengths: Tensor = torch.linalg.vector_norm(rows.to(down.dtype) + adapter.scaling * change, dim=1)
            return lengths
        blocks = [rows] if rows.dtype == down.dtype else list(torch.split(rows, ROWS))
        widened = (block.to(down.dtype) for block in blocks)
        pairs = [(torch.linalg.vector_norm(block, dim=1) ** 2, block @ down.mT) for block in widened]
        squared, crossed = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        scaling = adapter.scaling
        total = squared + ((2 * scaling * crossed + scaling**2 * (up @ (down @ down.mT))) * up).sum(1)
        return total.clamp_min(0).sqrt()
