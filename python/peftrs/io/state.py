"""Adapters as state dicts: an adapter's tensors under the names that files have, and back."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from typing import Literal, cast

from torch import Tensor, nn

from peftrs.bases.sharded import reshard, whole
from peftrs.config import PeftType, TargetedConfig
from peftrs.core.select import select
from peftrs.core.tree import places, uncompiled, users_model
from peftrs.errors import AdapterError, PeftrsWarning, complain, listed
from peftrs.hub import cached_file
from peftrs.io.checkpoint import MemorySource, Source
from peftrs.io.entries import Entry, embeddings, entries, plain
from peftrs.io.experts import fused
from peftrs.io.load import Incompatible, load

EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")


def config_of(model: nn.Module, adapter: str) -> TargetedConfig:
    """The config of an adapter of a model. Raises `AdapterError` for an unknown one."""
    configs = cast("dict[str, TargetedConfig]", getattr(model, "peft_config", {}))
    if adapter not in configs:
        raise AdapterError(f"Adapter {adapter} not found. The model has {list(configs)}.")
    return configs[adapter]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The adapter's tensors by the names that files have, without its own name.

    `state_dict` holds the model's tensors by their full names, gathered elsewhere (by a trainer, from
    shards); without it they are read off the model. `save_embedding_layers` adds the model's embeddings:
    "auto" does if they are adapted, or if the vocabulary is not the one that the base's config file has, as
    far as that file can be had without the network.

    Tensors that lie over processes are gathered, for which all of them must ask; ones that wait for values
    are on the device meta. Raises `AdapterError` for an unknown adapter, for tensors of which only a part is
    there, or (unless the process is lenient) for tensors that `state_dict` lacks.
    """
    return collect(
        model, state_dict, adapter_name, save_embedding_layers, unwrap_compiled=unwrap_compiled, waiting=True
    )


def collect(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None,
    adapter_name: str,
    save_embedding_layers: bool | Literal["auto"],
    *,
    unwrap_compiled: bool = False,
    keep: bool = True,
    waiting: bool = False,
) -> dict[str, Tensor]:
    """As `get_peft_model_state_dict`; without `keep` only takes part in what processes gather together, and
    gives nothing.

    Tensors that were never given values (`low_cpu_mem_usage`) are among what is given only if `waiting`.
    """
    if unwrap_compiled:
        model = uncompiled(model)
    reshard(model)
    config = config_of(model, adapter_name)
    found = list(entries(model, adapter_name, config))
    targeted = adapts_embeddings(model, config)
    if save_embedding_layers == "auto":
        # Of a vocabulary that grew both are needed, whichever is adapted: no base has the other one either.
        resized = not config.is_prompt_learning and _resized(model)
        save_embedding_layers = resized or (targeted and not trains_rows(config))
        targeted = targeted and not resized
    else:
        targeted = False
    if save_embedding_layers:
        extra = list(embeddings(model, adapter_name, targeted=targeted))
        if not extra:
            warnings.warn(
                "the model does not say which layers are its embeddings; none are saved",
                PeftrsWarning,
                stacklevel=2,
            )
        found += extra
    tensors = (
        {entry.key: entry.shown for entry in found} if state_dict is None else _looked_up(found, state_dict)
    )
    gathered: dict[str, Tensor] = {}
    shapes = {entry.key: entry.shape for entry in found}
    parts = []
    for key, held in tensors.items():
        # Not detached before: what knows where a parameter's parts are is the parameter.
        tensor = whole(held).detach()
        if tuple(tensor.shape) != shapes[key] or (tensor.is_meta and not waiting):
            state = "no values" if tensor.is_meta else f"shape {list(tensor.shape)}"
            parts.append(f"{key} has {state} instead of {list(shapes[key])}")
        if keep:
            gathered[key] = tensor if tensor.is_meta or tensor.data_ptr() == held.data_ptr() else tensor.cpu()
    if parts:
        raise AdapterError(
            f"{len(parts)} of the {len(tensors)} tensors of adapter {adapter_name!r} are not whole:"
            f" {'; '.join(parts[:4])}; hint: gather them and pass them as `state_dict` (accelerate:"
            " `accelerator.get_state_dict(model)`)"
        )
    return gathered


def _looked_up(found: list[Entry], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    given = {plain(name): tensor for name, tensor in state_dict.items()}
    tensors, lost = {}, []
    for entry in found:
        tensor = given.get(entry.name, given.get(f"module.{entry.name}"))
        if tensor is not None:
            tensors[entry.key] = (
                tensor.detach().mT if entry.transposed and tensor.ndim > 1 else tensor.detach()
            )
        elif entry.computed:
            tensors[entry.key] = entry.shown.detach()
        elif entry.required:
            lost.append(entry.name)
    if lost:
        complain(
            f"the `state_dict` given lacks {len(lost)} of the adapter's {len(found)} tensors:"
            f" {listed(lost, 4)}",
            AdapterError,
        )
    return tensors


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Incompatible:
    """Puts tensors by the names that files have, with or without their prefix, into an adapter that the model
    has.

    Returns what was missing (names in memory) and unexpected. Raises `CheckpointError`, changing nothing, for
    tensors of another shape (with `ignore_mismatched_sizes` they are left out and a warning names them) and
    for ones that would overwrite weights of the model which the adapter's config does not name.
    """
    config = config_of(model, adapter_name)
    source: Source = MemorySource(peft_model_state_dict, "the state dict")
    source = fused(model, adapter_name, config, source)
    return load(
        model,
        adapter_name,
        config,
        source,
        strict=None,
        report=True,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )


def trains_rows(config: TargetedConfig) -> bool:
    """Whether the adapter's file holds all that it changes in embeddings, since it replaces rows of them."""
    return bool(config.trainable_token_indices) or config.peft_type == PeftType.TRAINABLE_TOKENS


def adapts_embeddings(model: nn.Module, config: TargetedConfig) -> bool:
    """Whether the config's targets name an embedding by one of the names that those usually have."""
    targets = config.target_modules
    if not targets or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return False
    if not isinstance(targets, str):
        return any(name in targets for name in EMBEDDING_LAYER_NAMES)
    found = [
        place
        for place in places(users_model(model))
        if place.name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
    ]
    return bool(found) and bool(select(found, config).targets)


def _resized(model: nn.Module) -> bool:
    """Whether the model's vocabulary differs from the one that the config file states from which it was
    made.
    """
    settings = getattr(model, "config", None)
    own, base = getattr(settings, "vocab_size", None), getattr(settings, "_name_or_path", None)
    file = cached_file(base, "config.json") if own and base else None
    if file is None:
        return False
    try:
        with open(file, encoding="utf-8") as text:
            stated = json.load(text).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return False
    if stated is None or stated == own:
        return False
    warnings.warn(
        f"the vocabulary has {own} tokens, in {os.path.dirname(file)} it has {stated}: the embeddings are"
        " saved with the adapter",
        PeftrsWarning,
        stacklevel=3,
    )
    return True
