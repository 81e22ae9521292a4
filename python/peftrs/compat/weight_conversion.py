"""How transformers must rename an adapter file's keys to load it into a model: the prefix goes, the adapter's name comes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peftrs import registry
from peftrs.errors import ConfigError

CONTAINERS = {"token_adapter"}
"""Containers besides those with the method's prefix."""


def build_peft_weight_mapping(conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None) -> list[Any]:
    """The renamings for `adapter_name`, then those of the model's own `conversions` that only rename.

    Raises `ConfigError` where the model fuses or splits weights that the adapter may be for: such an adapter cannot be loaded
    by renaming alone.
    """
    from transformers.core_model_loading import WeightRenaming

    prefixes = {registry.method(peft_config.peft_type).prefix} if peft_config is not None else {"lora_", "ia3_", "oft_"}
    renamings = [WeightRenaming("base_model.model.model.", "model."), WeightRenaming("base_model.model.", "")]
    for prefix in sorted(prefixes | CONTAINERS):
        own = re.escape(prefix) + ("" if prefix in CONTAINERS else r"[^\.]*")
        renamings.append(WeightRenaming(source_patterns=f"({own})", target_patterns=rf"\1.{adapter_name}"))
    others = [one for one in conversions or () if not isinstance(one, WeightRenaming)]
    if others and getattr(peft_config, "target_parameters", None):
        raise ConfigError(
            f"the model fuses weights while loading ({len(others)} conversions) and the adapter targets bare parameters: "
            "load it with PeftModel.from_pretrained instead"
        )
    return renamings + [one for one in conversions or () if isinstance(one, WeightRenaming)]
