"""PEFT's conversions for transformers 5: of configs, of tensors, and as what transformers itself converts
with while it loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs import registry
from peftrs.bases.experts import Fusion, fusion_of
from peftrs.config import PeftConfig, PeftType, TargetedConfig
from peftrs.core.select import ALL_LINEAR
from peftrs.core.tree import places, users_model
from peftrs.io.checkpoint import PREFIX, MemorySource
from peftrs.io.experts import fused, joined_down, joined_up
from peftrs.planning.experts import converted

CONTAINERS = {"token_adapter"}
"""Containers besides those with the method's prefix."""


def convert_peft_config_for_transformers(
    peft_config: PeftConfig, model: nn.Module, conversions: list[Any] | None
) -> None:
    """Makes a LoRA's config that names layers of experts name the parameter that they are in this model, in
    place.

    `conversions` are known from the model. Raises `ConfigError` for what cannot be named so.
    """
    if peft_config.peft_type != PeftType.LORA:
        return
    inner = users_model(model)
    for name, value in converted(peft_config, peft_config.target_modules, inner, list(places(inner))).items():
        setattr(peft_config, name, value)


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """An adapter's tensors, by the names that files have, as those of the parameters that hold all experts in
    this model.

    The model has the adapter already. What needs no change is given back as it is.
    """
    memory = MemorySource(adapter_state_dict, "the state dict")
    source = fused(model, adapter_name, cast(TargetedConfig, peft_config), memory)
    if source is memory:
        return dict(adapter_state_dict)
    found = {name: source.read(name) for name in source.described()}
    return {
        name if name.startswith("base_model.") else PREFIX + name: tensor for name, tensor in found.items()
    }


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """How transformers must rename and join an adapter file's tensors to load them into a model that has the
    adapter.

    First the renamings for `adapter_name`, then those of the model's own `weight_conversions`: renamings as
    they are, and for layers of experts that are one parameter now the joining of their factors.
    """
    from transformers.core_model_loading import WeightRenaming

    prefixes = (
        {registry.method(peft_config.peft_type).prefix}
        if peft_config is not None
        else {"lora_", "ia3_", "oft_"}
    )
    renamings = [WeightRenaming("base_model.model.model.", "model."), WeightRenaming("base_model.model.", "")]
    for prefix in sorted(prefixes | CONTAINERS):
        own = re.escape(prefix) + ("" if prefix in CONTAINERS else r"[^\.]*")
        renamings.append(WeightRenaming(source_patterns=f"({own})", target_patterns=rf"\1.{adapter_name}"))
    conversions = list(weight_conversions or ())
    fusions = [
        found
        for one in conversions
        if (found := fusion_of(one)) is not None and _targeted(found, peft_config)
    ]
    for one in conversions:
        if isinstance(one, WeightRenaming):
            renamings.append(one)
        elif (found := fusion_of(one)) in fusions:
            # The parameter that is adapted first is the innermost.
            depth = sum(other.holder == found.holder for other in fusions[fusions.index(found) + 1 :])
            renamings += [_joining(one, side, adapter_name, depth) for side in "AB"]
    return renamings


def _targeted(fusion: Fusion, config: Any) -> bool:
    """Whether a config that names layers one by one is for those of a fusion."""
    if config is None or config.peft_type != PeftType.LORA:
        return False
    targets = config.target_modules or ()
    if isinstance(targets, str):
        return targets.lower() == ALL_LINEAR or any(layer in targets for layer in fusion.layers)
    return any(one == layer or one.endswith(f".{layer}") for one in targets for layer in fusion.layers)


def _joining(conversion: Any, side: str, adapter: str, depth: int) -> Any:
    """What joins the factors of one side of the layers that a conversion of transformers joins."""
    from transformers.core_model_loading import ConversionOps, MergeModulelist

    class Join(ConversionOps):  # type: ignore[misc]
        @torch.no_grad()
        def convert(
            self, input_dict: dict[str, Any], source_patterns: list[str], full_layer_name: str, **options: Any
        ) -> dict[str, Tensor]:
            # Where there is one layer alone, merging its experts has named them by what they become.
            factors = (
                [input_dict[one] for one in source_patterns]
                if len(source_patterns) > 1
                else list(input_dict.values())
            )
            return {full_layer_name: joined_down(factors) if side == "A" else joined_up(factors)}

        @property
        def reverse_op(self) -> ConversionOps:
            raise NotImplementedError("the factors of single experts cannot be taken out of joined ones")

    holder = conversion.target_patterns[0].rpartition(".")[0] + ".base_layer" * depth
    return type(conversion)(
        source_patterns=[
            f"{pattern.rpartition('.')[0]}.lora_{side}.*" for pattern in conversion.source_patterns
        ],
        target_patterns=[f"{holder}.lora_{side}.{adapter}.weight"],
        operations=[MergeModulelist(dim=0), Join()],
    )
