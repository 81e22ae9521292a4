"""Models without values: the layers of a model in memory or of a checkpoint, to plan on and to name an adapter's tensors by."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftrs.bases.dense import CONVOLUTION

EMBEDDING = re.compile(r"(^|[._])(word_|tok_|position_|token_type_)?embed|^w[tp]e$")
"""How the last parts of embeddings' names look, which a checkpoint does not tell from linear layers."""
OUTPUTS = ("lm_head", "embed_out", "output_projection")
"""The last parts of output embeddings' names."""
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose linear layers are transformers' `Conv1D`, all but the output embedding."""


class Skeleton(nn.Module):
    """The root of a checkpoint's modules, with the model's config beside it."""

    config: dict[str, Any]

    def get_output_embeddings(self) -> nn.Module | None:
        """The output embedding, which "all-linear" leaves out."""
        return next((module for name, module in self.named_modules() if name.rpartition(".")[2] in OUTPUTS), None)


def of_model(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers have no values; what was shared stays so."""
    held = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): _empty(tensor) for tensor in held}
    return copy.deepcopy(model, memo)


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def of_checkpoint(
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], settings: dict[str, Any], transposed: bool | None
) -> Skeleton:
    """Modules with the names and shapes of a checkpoint's tensors, of the kinds that those suggest.

    A `weight` of two dimensions is a linear layer's (stored `(in, out)` if `transposed`, by default as the config's model type
    has it) or by its name an embedding's; of more, a convolution's. All else are bare parameters.
    """
    root = Skeleton()
    root.config = settings
    if transposed is None:
        transposed = settings.get("model_type") in TRANSPOSED
    leaves: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for name, (dtype, shape) in described.items():
        path, _, leaf = name.rpartition(".")
        leaves.setdefault(path, {})[leaf] = (dtype, shape)
    for path, its in sorted(leaves.items()):
        module = _module(path.rpartition(".")[2], its, transposed)
        for leaf, (dtype, shape) in its.items():
            module.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))
        _hang(root, path, module)
    return root


def _module(name: str, its: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], transposed: bool) -> nn.Module:
    shape = its["weight"][1] if its.keys() <= {"weight", "bias"} and "weight" in its else ()
    bias = "bias" in its
    with torch.device("meta"):
        if len(shape) == 2 and EMBEDDING.search(name):
            return nn.Embedding(*shape)
        if len(shape) == 2 and transposed and name not in OUTPUTS:
            from transformers.pytorch_utils import Conv1D

            layer: nn.Module = Conv1D(shape[1], shape[0])
            return layer
        if len(shape) == 2:
            return nn.Linear(shape[1], shape[0], bias)
        if 2 < len(shape) < 6:
            kind: Any = list(CONVOLUTION)[len(shape) - 3]
            convolution: nn.Module = kind(shape[1], shape[0], shape[2:], bias=bias)
            return convolution
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
