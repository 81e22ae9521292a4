"""The tensors of the user's model itself, whatever adapters are in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftrs.core.prompt import Prompts
from peftrs.core.tree import adapted_layers, original, users_model
from peftrs.errors import MergeError, MismatchError, listed
from peftrs.torch_private import IncompatibleKeys

__all__ = ["cast_mixed_precision_params", "get_base_model_state_dict", "set_base_model_state_dict"]


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by the names that they have without adapters.

    While adapters are merged, the weights hold them.
    """
    found: dict[str, Tensor] = {}
    _gather(users_model(model), "", found)
    return found


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Puts tensors, by those names, into the model; returns what was missing and unexpected, as
    `load_state_dict` does.

    Raises `MismatchError`, with nothing changed, for tensors of another shape and, if `strict`, for missing
    or unexpected ones; `MergeError` while adapters are merged.
    """
    if any(layer.merged for layer in adapted_layers(model)):
        raise MergeError(
            "adapters are merged into the weights; hint: unmerge them before the weights are replaced"
        )
    own = get_base_model_state_dict(model)
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    given = {name: tensor for name, tensor in state_dict.items() if name in own}
    faults = [
        f"{name} has shape {list(tensor.shape)}, the model {list(own[name].shape)}"
        for name, tensor in given.items()
        if tensor.shape != own[name].shape
    ]
    if strict:
        faults += [f"{len(missing)} missing: {listed(missing, 4)}"] if missing else []
        faults += [f"{len(unexpected)} unexpected: {listed(unexpected, 4)}"] if unexpected else []
    if faults:
        raise MismatchError(f"the tensors are not those of this model: {'; '.join(faults[:8])}")
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)
    return IncompatibleKeys(missing, unexpected)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes what is trained float32, and all other parameters `dtype`, for training under autocast."""
    for parameter in model.parameters():
        parameter.data = parameter.to(torch.float32 if parameter.requires_grad else dtype)


def _gather(module: nn.Module, prefix: str, found: dict[str, Tensor]) -> None:
    module = original(module)
    module._save_to_state_dict(found, prefix, False)
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, Prompts):
            _gather(child, f"{prefix}{name}.", found)
