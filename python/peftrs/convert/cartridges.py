"""Cartridges put together: one that reads as the others do one after the other."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from peftrs.config import PeftConfig, PeftType
from peftrs.core.prompt import PROMPT
from peftrs.errors import AdapterError, CheckpointError, ConfigError
from peftrs.io.checkpoint import load_peft_weights, write
from peftrs.methods.cartridge import CartridgeConfig

SAME = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Writes a cartridge whose keys and values are those of the others, in the order given; the first one's
    frozen tokens stay so.

    Raises `ConfigError` for fewer than two, for adapters of another kind and for cartridges of models of
    other sizes.
    """
    if not safe_serialization:
        raise AdapterError(
            "`safe_serialization=False`: peftrs writes safetensors only, since loading a pickle runs what is"
            " in it"
        )
    paths = [os.fspath(path) for path in adapter_paths]
    if len(paths) < 2:
        raise ConfigError("Need at least 2 adapters to compose.")
    configs = [PeftConfig.from_pretrained(path) for path in paths]
    faults = [
        f"{path}: is a {config.peft_type} adapter, not a cartridge"
        for path, config in zip(paths, configs, strict=True)
        if config.peft_type != PeftType.CARTRIDGE
    ]
    faults = faults or [
        f"{path}: {name} is {getattr(config, name)}, in {paths[0]} it is {getattr(configs[0], name)}"
        for path, config in zip(paths, configs, strict=True)
        for name in SAME
        if getattr(config, name) != getattr(configs[0], name)
    ]
    if faults:
        raise ConfigError("; ".join(faults[:8]))
    tensors = [load_peft_weights(path) for path in paths]
    lacking = [path for path, held in zip(paths, tensors, strict=True) if PROMPT not in held]
    if lacking:
        raise CheckpointError(f"{', '.join(lacking)}: {PROMPT} is missing")
    rows = torch.cat([held[PROMPT] for held in tensors])
    first = configs[0]
    assert isinstance(first, CartridgeConfig)
    composed = dataclasses.replace(first, num_virtual_tokens=len(rows), peft_type=None)
    write(Path(output_path), composed.to_json(), {PROMPT: rows}, {})
