"""Helpers out of PEFT's inner modules that users' code reaches into, and its constants."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftrs.bases.resolve import resolve
from peftrs.config import CONFIG_NAME, NO_TARGETS, TargetedConfig
from peftrs.core.layer import AdaptedLayer
from peftrs.core.select import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND
from peftrs.core.select import select
from peftrs.core.tree import Place
from peftrs.errors import ConfigError, listed
from peftrs.io.checkpoint import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from peftrs.io.state import EMBEDDING_LAYER_NAMES
from peftrs.planning.grow import replicate as replicate_layers
from peftrs.planning.settle import CLASSIFIERS as SEQ_CLS_HEAD_NAMES
from peftrs.planning.settle import LONG_LIST as MIN_TARGET_MODULES_FOR_OPTIMIZATION

WEIGHTS_NAME = "adapter_model.bin"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
DUMMY_TARGET_MODULES = NO_TARGETS
DUMMY_MODEL_CONFIG = {"model_type": "custom"}


class BufferDict(nn.Module, MutableMapping[str, Tensor]):
    """Tensors by name that go where their module goes and are not trained; `persistent` says whether
    `state_dict` has them.
    """

    def __init__(self, buffers: MutableMapping[str, Tensor] | None = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        self.update(buffers or {})

    def __getitem__(self, name: str) -> Tensor:
        found = self._buffers[name]
        if found is None:
            raise KeyError(name)
        return found

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=self.persistent)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def check_adapters_to_merge(module: AdaptedLayer, adapter_names: Sequence[str] | None = None) -> list[str]:
    """The adapters to merge into a layer that are not merged yet: those named, else the active ones."""
    return module.to_merge(adapter_names)


def check_target_module_exists(config: TargetedConfig, key: str) -> bool:
    """Whether the config's patterns make a target of a module of this name."""
    nowhere = nn.Identity()
    return bool(select([Place(key, nowhere, nowhere, "", [])], config).targets)


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """A layer's weight, `(out, in)`, computed from what a quantized one stores.

    Raises `ConfigError` for what is no layer.
    """
    base = resolve(module)
    if base is None:
        raise ConfigError(f"a {type(module).__name__} has no weight that peftrs knows")
    return base.dense(module).weight


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight, turned around if it is stored as `(in, out)`."""
    return weight.mT if fan_in_fan_out else weight


def init_empty_weights(include_buffers: bool | None = None) -> AbstractContextManager[Any]:
    """A context in which modules are made without values (device meta), buffers too."""
    return torch.device("meta")


def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: nn.Module | None = None) -> Any:
    """A context in which parameters that DeepSpeed ZeRO-3 keeps in shards are whole; without it, one that
    does nothing.
    """
    first = param if isinstance(param, Tensor) else next(iter(param), None)
    if not hasattr(first, "ds_id"):
        return nullcontext()
    import deepspeed  # type: ignore[import-not-found, unused-ignore]

    return deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module)


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is `dimension`: `factor` and the rest if that goes, else the two nearest to
    each other.

    The lesser comes first, and is at most `factor` where that is given.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = math.isqrt(dimension) if factor < 1 else min(factor, math.isqrt(dimension))
    lesser = next(number for number in range(max(limit, 1), 0, -1) if dimension % number == 0)
    return lesser, dimension // lesser


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """Which modules of a model are units of FSDP: its blocks, by `_no_split_modules` or
    FSDP_TRANSFORMER_CLS_TO_WRAP.

    Adapters belong to the unit of their block, whose frozen and trained parameters lie together: FSDP needs
    `use_orig_params=True`, accelerate's default. Raises `ConfigError` where that variable names a class that
    the model has no module of.
    """
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    stated = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    classes = {type(module).__name__: type(module) for module in model.modules()}
    if stated:
        names = [name for name in stated.split(",") if name]
        if lost := [name for name in names if name not in classes]:
            raise ConfigError(
                f"FSDP_TRANSFORMER_CLS_TO_WRAP={stated!r}: the model has no module of the class"
                f" {listed(lost)}"
            )
    else:
        names = [name for name in getattr(model, "_no_split_modules", None) or () if name in classes]
    return partial(transformer_auto_wrap_policy, transformer_layer_cls={classes[name] for name in names})


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """`peft.helpers.disable_input_dtype_casting`: adapters cast their inputs as they must, so there is
    nothing to turn off.
    """
    yield


__all__ = [
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "replicate_layers",
]
