"""QA-LoRA: LoRA whose `A` sees its input summed in groups, so that the change of a weight is one number for a
group of columns.

Xu et al. 2023, https://arxiv.org/abs/2309.14717. With groups of `g` columns, `W + s·B·(A ⊗ 1ᵀ)·in/g²`, `A (r,
in/g)`: each input is the mean of its group times the number of groups, as PEFT has it. PEFT applies it over
GPTQ only and ignores `use_qalora` elsewhere; here it is the same over every linear layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from peftrs.bases.kinds import LayerKind, LayerSpec, Term
from peftrs.core.method import Adapter, Below, Method, Slots
from peftrs.errors import ConfigError
from peftrs.methods.lora import Lora, LoraConfig, product
from peftrs.registry import register


@register
class QaLora(Lora):
    """LoRA with `use_qalora=True`; its configs and files are LoRA's, `lora_A` being narrower."""

    name = "QALORA"
    layers = frozenset({LayerKind.LINEAR})
    attributes = (*Lora.attributes, "qalora_group_size")

    def variant(self, config: LoraConfig) -> Method:
        return self

    def settle(self, config: LoraConfig, spec: LayerSpec) -> dict[str, Any]:
        group = config.qalora_group_size
        if group < 1 or spec.in_features % group:
            raise ConfigError(
                f"`use_qalora`: {spec.in_features} inputs are not a multiple of qalora_group_size={group}"
            )
        return super().settle(config, spec)

    def slots(self, config: LoraConfig, spec: LayerSpec, values: dict[str, Any]) -> Slots:
        groups = spec.in_features // config.qalora_group_size
        return {**super().slots(config, spec, values), "lora_A.weight": (values["r"], groups)}

    def term(self, adapter: Adapter) -> Term | None:
        narrow, group = product(adapter), adapter.config.qalora_group_size
        return narrow._replace(down=narrow.down.repeat_interleave(group, 1) * (narrow.down.shape[1] / group))

    def fused_term(self, adapter: Adapter) -> Term | None:
        return None  # `path` has fewer products to take, since inputs are summed in groups first

    def path(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        term, group = product(adapter), adapter.config.qalora_group_size
        down = term.down
        kept = functional.dropout(x.to(down.dtype), term.dropout, below.training)
        pooled = kept.view(*kept.shape[:-1], -1, group).mean(-1) * down.shape[1]
        return functional.linear(functional.linear(pooled, down), term.up, term.shift)
