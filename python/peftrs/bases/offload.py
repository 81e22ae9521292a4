"""Modules whose tensors accelerate keeps elsewhere between calls, in memory or on disk: reading them, and
writing them back.

While they are away the module's own parameters are on the device meta, and a hook on the module knows where
the values are.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from peftrs.errors import PeftrsWarning

Held = TypeVar("Held", bound=Tensor)


def hook_of(module: nn.Module) -> Any | None:
    """The hook that keeps this module's tensors elsewhere, or None."""
    hook: Any = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and one.weights_map is not None:
            return one
    return None


def fetched(module: nn.Module, tensor: Held) -> Held | Tensor:
    """One of the module's parameters as calls see it: itself, unless it is away."""
    hook = hook_of(module) if tensor.is_meta else None
    if hook is None:
        return tensor
    name = next(name for name, own in module._parameters.items() if own is tensor)
    value: Tensor = hook.weights_map[name].to(hook.execution_device, tensor.dtype)
    return value


def device_of(module: nn.Module, tensor: Tensor) -> torch.device:
    """Where calls see one of the module's parameters."""
    hook = hook_of(module) if tensor.is_meta else None
    return tensor.device if hook is None else torch.empty(0, device=hook.execution_device).device


@contextmanager
def onloaded(module: nn.Module, *, write: bool = False) -> Iterator[None]:
    """The module's own parameters in their place inside the `with`; with `write`, calls see them as they are
    at its end.
    """
    hook = hook_of(module)
    away = (
        {}
        if hook is None
        else {name: one for name, one in module._parameters.items() if one is not None and one.is_meta}
    )
    for name, one in away.items():
        value = fetched(module, one).detach()
        # A tensor of the hook's own may be that of another module too.
        module._parameters[name] = nn.Parameter(
            value.clone() if write else value, requires_grad=one.requires_grad
        )
    try:
        yield
        for name, one in away.items() if write else ():
            now = cast(nn.Parameter, module._parameters[name])
            put(module, name, now)
            one.data = one.data.to(now.dtype)
    finally:
        module._parameters.update(away)


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Makes `value` what calls see of a parameter that is away: on disk if it was there, and in memory else.

    Where the disk means the user's own checkpoint, which stays as it is, a folder is made that lasts as long
    as the model.
    """
    hook: Any = hook_of(module)
    place, value = hook.weights_map, value.detach().cpu()
    while hasattr(place, "prefix"):
        place, name = place.dataset, place.prefix + name
    if isinstance(place, dict):
        place[name] = value
    elif name in place.state_dict:
        place.state_dict[name] = value
    else:
        from accelerate.utils import offload_weight

        if place.save_folder is None:
            place.save_folder = tempfile.mkdtemp(prefix="peftrs-")
            weakref.finalize(place, shutil.rmtree, place.save_folder, ignore_errors=True)
            warnings.warn(
                f"changed weights are kept in {place.save_folder} as long as the model is there, since it was"
                " loaded without an `offload_folder`",
                PeftrsWarning,
                stacklevel=2,
            )
        offload_weight(value, name, place.save_folder, place.index)


def copied(module: nn.Module) -> nn.Module:
    """A copy of the module whose tensors are its own and where calls see them, without accelerate's hooks."""
    hooks = {one: hook for one in module.modules() if (hook := one.__dict__.get("_hf_hook")) is not None}
    if not hooks:
        return copy.deepcopy(module)
    from accelerate.hooks import remove_hook_from_module

    away = [one for one in hooks if hook_of(one) is not None]
    # The hooks are not copied, since they hold what is away of the whole model.
    twin: nn.Module = copy.deepcopy(module, {id(hook): None for hook in hooks.values()})
    for one, other in zip(module.modules(), twin.modules(), strict=True):
        if one in away:
            for name, held in one._parameters.items():
                if held is not None and held.is_meta:
                    other._parameters[name] = nn.Parameter(
                        fetched(one, held).detach().clone(), requires_grad=held.requires_grad
                    )
        other.__dict__.pop("_hf_hook", None)
    remove_hook_from_module(twin, recurse=True)
    return twin
