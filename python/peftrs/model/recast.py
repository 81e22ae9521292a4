"""A whole model in another dtype: what it would be had it been loaded in that.

transformers builds a model in a dtype and gives each tensor of a checkpoint the dtype of the one that it
fills. So most are of that dtype, but not those that the model's code makes in another (the frequencies of
rotary embeddings) or whose names the class wants in float32. The same class built without values, on the
device meta, says which.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftrs.bases.offload import fetched, hook_of, put
from peftrs.bases.sharded import is_distributed, is_partitioned, sharded_by
from peftrs.core.replace import ReplacedModule
from peftrs.core.tree import modules
from peftrs.errors import MergeError, listed

Goal = Callable[["Held"], torch.dtype]


class Held(NamedTuple):
    """A tensor in a model: its name there, the module that has it, itself, and whether checkpoints hold
    it.
    """

    name: str
    module: nn.Module
    tensor: Tensor
    saved: bool


def check_castable(model: nn.Module, dtype: Any) -> None:
    """Raises `MergeError` for a model, with adapters in it, that cannot be had in this dtype."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise MergeError(
            f"no model computes in dtype={dtype!r}; hint: torch.bfloat16, torch.float16 or torch.float32"
        )
    most, lasting = (
        torch.finfo(dtype).max,
        [held for held in _lasting(model) if held.tensor.dtype is not dtype],
    )
    spread = (
        "DeepSpeed's ZeRO-3" if any(is_partitioned(held.tensor) for held in lasting) else sharded_by(model)
    )
    if lasting and spread is not None:
        raise MergeError(
            f"{spread} keeps the dtype that it met a model in, and {listed([held.name for held in lasting])}"
            f" are not of {dtype}; hint: merge without `dtype`, or load the adapter onto a model that is not"
            " spread"
        )
    # Between 16 and 32 bits of the same range only what rounds up at its very end would be infinite.
    narrowed = [held for held in lasting if torch.finfo(held.tensor.dtype).max > 2 * most]
    if beyond := [held.name for held in narrowed if _reach(held) > most]:
        raise MergeError(
            f"{listed(beyond)} hold numbers beyond {most:g}, the largest of {dtype}; hint: merge into a wider"
            " dtype"
        )


def recast(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives the model's tensors the dtypes that they would have had it been loaded in `dtype`, and says so in
    its config.

    What is shared stays so. Modules that are still quantized, and what is of no floating-point dtype, stay as
    they are.
    """
    goals = planned(model, dtype)
    done: dict[Tensor, Tensor] = {}

    def cast(tensor: Tensor) -> Tensor:
        goal = goals.get(tensor, tensor.dtype)
        if goal is tensor.dtype:
            return tensor
        if tensor not in done:
            done[tensor] = tensor.to(goal)
        return done[tensor]

    away = [
        held for held in _floating(model) if held.tensor.is_meta and isinstance(held.tensor, nn.Parameter)
    ]
    for held in away:
        if goals[held.tensor] is not held.tensor.dtype and hook_of(held.module) is not None:
            put(
                held.module,
                held.name.rpartition(".")[2],
                fetched(held.module, held.tensor).to(goals[held.tensor]),
            )
    if any(tensor.dtype is not goal for tensor, goal in goals.items()):
        model._apply(cast)  # type: ignore[no-untyped-call]
    for module in model.modules():
        settings = module.__dict__.get("config")
        if _is_a(settings, "transformers.configuration_utils", "PreTrainedConfig", "PretrainedConfig"):
            _state(settings, dtype)


def planned(model: nn.Module, dtype: torch.dtype) -> dict[Tensor, torch.dtype]:
    """The dtype that each floating-point tensor of the model is to have, gradients as what they belong to.

    What belongs to no model of a library gets the dtype as by a module's own `to`.
    """
    goals: dict[Tensor, torch.dtype] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        goal = _as_loaded(module, dtype)
        for held in _floating(module, recurse=goal is not None):
            kind = goals.setdefault(held.tensor, dtype if goal is None else goal(held))
            if held.tensor.grad is not None:
                goals[held.tensor.grad] = kind
        if goal is None:
            waiting += module.children()
    return goals


def _as_loaded(module: nn.Module, dtype: torch.dtype) -> Goal | None:
    """What dtypes a library would load the module's tensors in, or None for a module that is no model of
    one.
    """
    if _is_a(module, "transformers.modeling_utils", "PreTrainedModel"):
        return _as_by_transformers(module, dtype)
    if _is_a(module, "diffusers.models.modeling_utils", "ModelMixin"):
        kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
        return lambda held: dtype if kept.isdisjoint(held.name.split(".")) else torch.float32
    return None


def _as_by_transformers(model: nn.Module, dtype: torch.dtype) -> Goal:
    """Where the class cannot be built without values, what checkpoints do not hold keeps its dtype."""
    wide, built = _kept_wide(model, dtype), _built(model, dtype)

    def goal(held: Held) -> torch.dtype:
        if (
            held.saved
            and (found := next((kind for pattern, kind in wide if pattern.search(held.name)), None))
            is not None
        ):
            return found
        if built is None and not held.saved:
            return held.tensor.dtype
        return (built or {}).get(held.name, dtype)

    return goal


def _kept_wide(model: Any, dtype: torch.dtype) -> list[tuple[re.Pattern[str], torch.dtype]]:
    """What the names of tensors hold that the class wants in a dtype of its own when it is loaded in this
    one.
    """
    if hasattr(model, "_get_dtype_plan"):
        plan = model._get_dtype_plan(dtype)
        return [(re.compile(pattern.replace("*", ".*")), kind) for pattern, kind in plan.items()]
    # Before version 5 whole parts of a name are meant.
    names = [*(getattr(model, "_keep_in_fp32_modules", None) or ())] if dtype is torch.float16 else []
    if dtype in (torch.float16, torch.bfloat16):
        names += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return [(re.compile(rf"(^|\.){name}($|\.)"), torch.float32) for name in names]


def _built(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype] | None:
    """The dtypes of a model's tensors as its class makes them in `dtype`, or None where it cannot be built
    without values.
    """
    config = copy.deepcopy(model.config)
    _state(config, dtype)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: nn.Module = type(model)._from_config(config)
    except Exception:  # a model's constructor raises whatever it likes
        return None
    return {held.name: held.tensor.dtype for held in _floating(made)}


def _state(settings: Any, dtype: torch.dtype) -> None:
    """Says the dtype in a config of transformers and those inside it."""
    setattr(settings, "dtype" if hasattr(settings, "dtype") else "torch_dtype", dtype)
    for name in getattr(settings, "sub_configs", ()):
        if (inner := getattr(settings, name, None)) is not None:
            _state(inner, dtype)


def _is_a(one: Any, module: str, *kinds: str) -> bool:
    """Whether this is of one of a module's classes, told without importing it."""
    return any(isinstance(one, getattr(sys.modules.get(module), kind, ())) for kind in kinds)


def _floating(model: nn.Module, *, recurse: bool = True) -> Iterator[Held]:
    """The floating-point tensors of a model, or of the module alone, but for those of modules that are
    quantized.
    """
    for path, module in model.named_modules() if recurse else [("", model)]:
        prefix = f"{path}." if path else ""
        parameters = [(name, one) for name, one in module._parameters.items() if one is not None]
        if not all(_is_plain(one) for _, one in parameters):
            continue
        yield from (Held(prefix + name, module, one, True) for name, one in parameters)
        for name, buffer in module._buffers.items():
            if buffer is not None and _is_plain(buffer):
                yield Held(prefix + name, module, buffer, name not in module._non_persistent_buffers_set)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is made of numbers that a model computes with, and is not one of a library that
    quantizes them.
    """
    packed = hasattr(tensor, "__tensor_flatten__") and not is_distributed(tensor)
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not packed


def _lasting(model: nn.Module) -> Iterator[Held]:
    """The parameters of a model with adapters that are there without them too."""
    for path, module in modules(model):
        trained = module.modules_to_save.modules() if isinstance(module, ReplacedModule) else ()
        for part in (module, *trained):
            for held in _floating(part, recurse=False):
                if isinstance(held.tensor, nn.Parameter):
                    yield held._replace(name=f"{path}.{held.name}" if path else held.name)


def _reach(held: Held) -> float:
    """The largest size among the tensor's finite numbers."""
    tensor = fetched(held.module, held.tensor).detach()
    if not tensor.numel() or is_distributed(tensor):
        return 0.0
    ends = torch.stack(torch.aminmax(tensor)).abs()
    if not bool(ends.isfinite().all()):
        ends = tensor[tensor.isfinite()].abs()
    return float(ends.max()) if ends.numel() else 0.0
