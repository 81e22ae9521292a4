"""Models without values: the layers of a model in memory or of a checkpoint, to plan on and to name an
adapter's tensors by.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from peftrs.bases.dense import CONVOLUTION
from peftrs.io.checkpoint import FileSource

OUTPUTS = ("lm_head", "embed_out", "output_projection")
"""The last parts of output embeddings' names."""
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Model types whose linear layers are transformers' `Conv1D`, all but the output embedding."""


class Skeleton(nn.Module):
    """The root of a checkpoint's modules, with the model's config beside it."""

    config: dict[str, Any]

    def get_output_embeddings(self) -> nn.Module | None:
        """The output embedding, which "all-linear" leaves out."""
        return next(
            (module for name, module in self.named_modules() if name.rpartition(".")[2] in OUTPUTS), None
        )


def of_model(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers have no values; what was shared stays so."""
    held = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): _empty(tensor) for tensor in held}
    return copy.deepcopy(model, memo)


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def of_checkpoint(source: FileSource, settings: dict[str, Any], transposed: bool | None) -> Skeleton:
    """Modules with the names and shapes of a checkpoint's tensors, of the kinds that those suggest.

    Linear weights are stored `(in, out)` if `transposed`, by default as the model type in the config has it.
    """
    root = Skeleton()
    root.config = settings
    if transposed is None:
        transposed = settings.get("model_type") in TRANSPOSED
    kinds = source.kinds()
    leaves: dict[str, dict[str, nn.Parameter]] = {}
    for name, (dtype, shape) in source.described().items():
        path, _, leaf = name.rpartition(".")
        empty = torch.empty(shape, dtype=dtype, device="meta")
        leaves.setdefault(path, {})[leaf] = nn.Parameter(empty, requires_grad=False)
    for path, its in sorted(leaves.items()):
        fits = "weight" in its and its.keys() <= {"weight", "bias"}
        module = _module(path, kinds.get(path) if fits else None, its, transposed)
        for leaf, parameter in its.items():
            module.register_parameter(leaf, parameter)
        _hang(root, path, module)
    return root


def _module(path: str, kind: str | None, its: dict[str, nn.Parameter], transposed: bool) -> nn.Module:
    with torch.device("meta"):
        if kind == "embedding":
            return nn.Embedding(*its["weight"].shape)
        if kind == "linear" and transposed and path.rpartition(".")[2] not in OUTPUTS:
            from transformers.pytorch_utils import Conv1D

            layer: nn.Module = Conv1D(*reversed(its["weight"].shape))
            return layer
        if kind == "linear":
            outputs, inputs = its["weight"].shape
            return nn.Linear(inputs, outputs, "bias" in its)
        convolution: Any = next((one for one, base in CONVOLUTION.items() if base.kind == kind), None)
        if convolution is not None:
            outputs, inputs, *window = its["weight"].shape
            convolved: nn.Module = convolution(inputs, outputs, tuple(window), bias="bias" in its)
            return convolved
    return nn.Module()


def _hang(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in its place, where one of the same path may stand for its children already."""
    if not path:
        for name, parameter in module.named_parameters(recurse=False):
            root.register_parameter(name, parameter)
        return
    parent = root
    *above, last = path.split(".")
    for part in above:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(last, module)


def read_settings(folder: str) -> dict[str, Any]:
    """The model's `config.json` in a folder, empty where there is none to be read."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
