"""Adapters that start from the base weights (PiSSA, OLoRA), written as plain LoRA of twice the rank.

What such an adapter changes is `s·(B·A − B₀·A₀)`, with the factors that it started from; stacked as `A' = [A;
A₀]`, `B' = [B, −B₀]` the same change is a LoRA that any library loads onto the unchanged base.
"""

from __future__ import annotations

import copy
import math
import os
from typing import Any, cast

import torch
from torch import Tensor

from peftrs.config import PeftConfig
from peftrs.errors import AdapterError, CheckpointError, listed
from peftrs.io.checkpoint import load_peft_weights

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def to_plain(
    tensors: dict[str, Tensor], config: PeftConfig, initial: str
) -> tuple[dict[str, Tensor], PeftConfig]:
    """The tensors and config of the plain LoRA; `initial` is the folder of the adapter before training.

    Raises `AdapterError` where the config does not allow it, `CheckpointError` where the initial adapter is
    another's.
    """
    settings = cast(Any, config)
    started = str(settings.init_lora_weights).lower()
    if not started.startswith(("pissa", "olora", "corda", "lora_ga")):
        raise AdapterError(
            f"init_lora_weights={settings.init_lora_weights!r} needs no initial model: save without it"
        )
    if settings.use_rslora and (settings.rank_pattern or settings.alpha_pattern):
        raise AdapterError(
            "`use_rslora` with rank or alpha patterns cannot be written as a plain LoRA of one scaling"
        )
    folder = os.fspath(initial)
    before = cast(Any, type(config).from_pretrained(folder))
    if str(before.init_lora_weights).lower().startswith(("pissa", "olora", "corda", "lora_ga")):
        raise AdapterError(
            f"{folder}: was saved with init_lora_weights={before.init_lora_weights!r}; it must be True there"
        )
    first = load_peft_weights(folder)
    wanted = [name for name in tensors if name.endswith((DOWN, UP))]
    lost = [name for name in wanted if name not in first or first[name].shape != tensors[name].shape]
    if lost:
        raise CheckpointError(
            f"{folder}: is not this adapter before training: {len(lost)} tensors do not fit:"
            f" {listed(lost, 4)}"
        )
    plain = dict(tensors)
    for name in wanted:
        start = first[name].to(tensors[name])
        plain[name] = torch.cat(
            [tensors[name], start if name.endswith(DOWN) else -start], 0 if name.endswith(DOWN) else 1
        )
    other = cast(Any, copy.copy(config))
    other.r, other.init_lora_weights = 2 * settings.r, True
    other.lora_alpha = settings.lora_alpha * (math.sqrt(2) if settings.use_rslora else 2)
    other.rank_pattern = {key: 2 * rank for key, rank in settings.rank_pattern.items()}
    other.alpha_pattern = {key: 2 * alpha for key, alpha in settings.alpha_pattern.items()}
    return plain, cast(PeftConfig, other)
