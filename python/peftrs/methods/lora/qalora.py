"""QA-LoRA: LoRA whose `A` sees its input summed in groups, so that the change of a weight is one number for a
group of columns.

Xu et al. 2023, https://arxiv.org/abs/2309.14717. With groups of `g` columns, `W + s·B·(A ⊗ 1ᵀ)·in/g²`, `A (r,
in/g)`: each input is the mean of its group times the number of groups, as PEFT has it. PEFT applies it over
GPTQ only and ignores `use_qalora` elsewhere; here it is the same over every linear layer.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.nn import functional

from peftrs.bases.kinds import LayerKind, LayerSpec
from peftrs.core.method import Adapter, Below, Method
from peftrs.errors import ConfigError
from peftrs.methods.lora import Lora, LoraConfig
from peftrs.registry import register


@register
class QaLora(Lora):
    """LoRA with `use_qalora=True`; its configs and files are LoRA's, `lora_A` being narrower."""

    name = "QALORA"
    layers = frozenset({LayerKind.LINEAR})
    attributes = (*Lora.attributes, "qalora_group_size")
    tied_slots = MappingProxyType({})

    def variant(self, config: LoraConfig) -> Method:
        return self

    def settle(self, config: LoraConfig, spec: LayerSpec) -> dict[str, Any]:
        group = config.qalora_group_size
        if group < 1 or spec.in_features % group:
            raise ConfigError(
                f"`use_qalora`: {spec.in_features} inputs are not a multiple of qalora_group_size={group}"
            )
        return super().settle(config, spec)

    def slots(
        self, config: LoraConfig, spec: LayerSpec, values: dict[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        groups = spec.in_features // config.qalora_group_size
        return super().slots(config, spec, values) | {"lora_A.weight": (values["r"], groups)}

    def factors(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        down, group = adapter["lora_A.weight"], adapter.config.qalora_group_size
        return adapter["lora_B.weight"], down.repeat_interleave(group, 1) * (down.shape[1] / group)

    def barrier(self, adapter: Adapter, below: Below) -> str | None:
        return "inputs are summed in groups"

    def path(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        down, group = adapter["lora_A.weight"], adapter.config.qalora_group_size
        kept = functional.dropout(x.to(down.dtype), adapter.config.lora_dropout, below.training)
        pooled = kept.view(*kept.shape[:-1], -1, group).mean(-1) * down.shape[1]
        return functional.linear(
            functional.linear(pooled, down), adapter["lora_B.weight"], self.shift(adapter)
        )
