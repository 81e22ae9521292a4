"""Writing a model's adapters into a folder."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from peftrs.config import PeftConfig, PeftType, TaskType
from peftrs.convert.plain import to_plain
from peftrs.core.tree import original, places
from peftrs.dtype import FLOATS
from peftrs.errors import AdapterError, listed
from peftrs.io.card import CARD_NAME, card
from peftrs.io.checkpoint import is_finite, write
from peftrs.io.fingerprint import KEY, fingerprint
from peftrs.io.state import collect

if TYPE_CHECKING:
    from peftrs.model.peft_model import PeftModel

DEFAULT = "default"
"""The adapter that is written into the folder itself."""


def save(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    safe_serialization: bool,
    selected: Sequence[str] | None,
    save_embedding_layers: bool | Literal["auto"],
    is_main_process: bool,
    initial: str | None,
    state_dict: Mapping[str, Tensor] | None,
    dtype: str | torch.dtype | None = None,
) -> None:
    """Writes adapters and the card; see `PeftModel.save_pretrained`."""
    if not safe_serialization:
        raise AdapterError(
            "`safe_serialization=False`: peftrs writes safetensors only, since loading a pickle runs what is"
            " in it"
        )
    if os.path.isfile(folder):
        raise AdapterError(f"{os.fspath(folder)}: is a file; an adapter is saved into a folder")
    chosen = chosen_dtype(dtype, model.get_base_model())
    known = model.peft_config
    names = list(known) if selected is None else list(selected)
    if unknown := [name for name in names if name not in known]:
        raise AdapterError(
            f"You passed an invalid `selected_adapters`: {unknown} are not among {list(known)}"
        )
    recorded = fingerprint(model.get_base_model()) if is_main_process else None
    for name in names:
        tensors = collect(model, state_dict, name, save_embedding_layers, keep=is_main_process)
        if not is_main_process:
            # The tensors were gathered, which all processes of a group do together.
            continue
        config = written(model.get_base_model(), known[name])
        if initial is not None and config.peft_type == PeftType.LORA:
            tensors, config = to_plain(tensors, config, initial)
        target = Path(folder) if name == DEFAULT else Path(folder) / name
        files = {CARD_NAME: card_text(model, folder).encode()} if name == DEFAULT else {}
        notes = {} if recorded is None else {KEY: recorded}
        write(target, config.to_json(), in_dtype(tensors, chosen), files, notes)
    if is_main_process and DEFAULT not in names:
        write_card(model, folder)


def chosen_dtype(dtype: str | torch.dtype | None, base: nn.Module) -> torch.dtype | None:
    """The dtype to write in: the one named, with "auto" the one that most of the model itself is in, or None
    to keep what is.

    Raises `AdapterError` for what is no floating-point dtype of adapters' files.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        found = dtype
    elif dtype == "auto":
        counts: Counter[torch.dtype] = Counter()
        for place in places(base):
            for parameter in original(place.module)._parameters.values():
                if parameter is not None and parameter.dtype in FLOATS:
                    counts[parameter.dtype] += parameter.numel()
        found = counts.most_common(1)[0][0] if counts else None
    else:
        found = getattr(torch, dtype.removeprefix("torch."), None)
    if dtype is not None and dtype != "auto" and found not in FLOATS:
        raise AdapterError(
            f"dtype={dtype!r} is not one that adapters are saved in:"
            f" {', '.join(map(str, sorted(FLOATS, key=str)))}"
        )
    return found


def in_dtype(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors in another floating-point dtype.

    Raises `AdapterError` for values that are too large for it.
    """
    if dtype is None:
        return tensors
    cast_to = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    lost = [name for name, tensor in cast_to.items() if not is_finite(tensor) and is_finite(tensors[name])]
    if lost:
        raise AdapterError(
            f"{dtype} cannot hold the values of {listed(lost, 4)}; hint: save in bfloat16 or float32"
        )
    return cast_to


def written(base: nn.Module, config: PeftConfig) -> PeftConfig:
    """The config as files have it: for inference, and saying what it was made for."""
    stated = copy.copy(config)
    stated.inference_mode = True
    if stated.base_model_name_or_path is None:
        stated.base_model_name_or_path = name_of(base)
    if stated.task_type is None:
        kind = type(base)
        stated.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return stated


def name_of(base: nn.Module) -> str | None:
    """Where a model came from, as transformers' models say."""
    return cast("str | None", base.__dict__.get("name_or_path")) or None


def write_card(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Writes the card alone."""
    text = card_text(model, folder)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / CARD_NAME).write_text(text, encoding="utf-8")


def card_text(model: PeftModel, folder: str | os.PathLike[str]) -> str:
    """The card of a model's adapters, keeping what a card in the folder says."""
    path = Path(folder) / CARD_NAME
    existing = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    base = cast(Any, model.get_base_model())
    name = getattr(getattr(base, "config", None), "_name_or_path", None) or name_of(base) or ""
    tags = [tag for tag in getattr(base, "model_tags", None) or () if isinstance(tag, str)]
    kinds = [str(cast(str, config.peft_type)) for config in model.peft_config.values()]
    tags += ["lora"] if PeftType.LORA in kinds else []
    tags += [f"base_model:adapter:{name}"] if name else []
    tags += (
        ["transformers"]
        if any(kind.__module__.startswith("transformers.") for kind in type(base).__mro__)
        else []
    )
    tasks = {config.task_type for config in model.peft_config.values()}
    pipeline = "text-generation" if TaskType.CAUSAL_LM in tasks else None
    return card(existing, base=name, methods=kinds, tags=tags, pipeline=pipeline)
