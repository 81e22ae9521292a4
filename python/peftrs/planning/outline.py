"""The layers of a model on disk by its class, which is built without weights."""

from __future__ import annotations

import os

import torch
from torch import nn

from peftrs.bases.resolve import resolve
from peftrs.core.select import is_linear
from peftrs.core.tree import places
from peftrs.errors import CheckpointError
from peftrs.planning.settle import output_layers

Outline = tuple[list[str], list[tuple[str, str, list[int], int]], list[str], list[str]]
"""All modules, layers as (name, kind, shape of the weight as stored, parameters), all parameters, what
"all-linear" stands for.
"""


def by_class(path: str | os.PathLike[str], task: str | None = None) -> Outline:
    """The outline of the model in a folder, or of whose files one is given; nothing of its code is run, only
    transformers'.

    Raises `CheckpointError` where transformers does not know the model, `ImportError` without transformers.
    """
    return describe(built(path), task)


def built(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> nn.Module:
    """The model in a folder without values, in `dtype` or the one that its config says; see `by_class`."""
    import transformers

    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        names = getattr(config, "architectures", None) or [""]
        known = getattr(transformers, names[0], None)
        build = known._from_config if known is not None else transformers.AutoModel.from_config
        if dtype is not None:
            config.torch_dtype = dtype
        with torch.device("meta"):
            model: nn.Module = build(config)
            if dtype is not None:
                model = model.to(dtype)
    except ImportError:
        raise
    except Exception as error:  # a model's constructor raises whatever it likes
        reason = f"transformers cannot build the model: {type(error).__name__}: {error}"
        raise CheckpointError(
            f"{os.fspath(folder)}: {reason}; hint: name the layers instead of asking the class"
        ) from error
    return model


def describe(model: nn.Module, task: str | None = None) -> Outline:
    """The outline of a model; `task` decides whether "all-linear" leaves a classifier's head out."""
    found = list(places(model))
    layers: list[tuple[str, str, list[int], int]] = []
    parameters = []
    for place in found:
        own = {name: one for name, one in place.module._parameters.items() if one is not None}
        parameters += [f"{place.name}.{name}" for name in sorted(own)]
        base = resolve(place.module)
        count = sum(one.numel() for one in own.values())
        if base is not None and own:
            layers.append((place.name, base.kind.value, list(base.parameters(place.module)[0].shape), count))
        elif own:
            stacks = [name for name, one in own.items() if one.ndim >= 2 and name != "weight"]
            layers += [
                (f"{place.name}.{name}", "parameter", list(own[name].shape), own[name].numel())
                for name in stacks
            ]
            if not stacks:
                layers.append((place.name, "other", list(next(iter(own.values())).shape), count))
    heads = output_layers(model, found, task)
    linear = [place.name for place in found if is_linear(place) and place.name not in heads]
    return [place.name for place in found], layers, parameters, linear
