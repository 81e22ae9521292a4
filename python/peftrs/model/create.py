"""The functions that put adapters into models, and the tables from names to classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from peftrs import registry
from peftrs.config import PeftConfig, PeftType
from peftrs.core import manage
from peftrs.core.inject import adapters
from peftrs.core.method import method_for
from peftrs.core.prompt import PromptMethod
from peftrs.core.tree import users_model
from peftrs.errors import ConfigError, PeftrsWarning
from peftrs.model.peft_model import PeftModel
from peftrs.model.saving import name_of
from peftrs.model.tasks import PeftMixedModel, class_for
from peftrs.model.tuners import TUNERS
from peftrs.planning.attach import attach


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """The model with a new adapter in it, as the class that the config's task type names; the model itself is
    changed.

    The config is kept, and filled in with the base model's name and what the model decides. `revision` is the
    base model's. Raises `ConfigError` or `TargetError` where the adapter does not fit the model, which is
    then left as it was.
    """
    name = name_of(model)
    stated = peft_config.base_model_name_or_path
    if stated is not None and name is not None and stated != name:
        text = f"the config's base model {stated!r} is replaced by the model's own name, {name!r}"
        warnings.warn(text, PeftrsWarning, stacklevel=2)
    peft_config.base_model_name_or_path = name
    if revision is not None:
        if peft_config.revision not in (None, revision):
            text = f"the config's revision {peft_config.revision!r} is replaced by {revision!r}"
            warnings.warn(text, PeftrsWarning, stacklevel=2)
        peft_config.revision = revision
    if isinstance(model, PeftModel) or adapters(model):
        warnings.warn(
            "the model has adapters already; to put another one beside them use `add_adapter` of its"
            " PeftModel, and to start anew `unload` it first",
            PeftrsWarning,
            stacklevel=2,
        )
    chosen = PeftMixedModel if mixed else class_for(peft_config)
    return chosen(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The model itself with an adapter in it, for libraries that manage their models; its `peft_config` has
    the configs.

    The new adapter is the one that acts, and is trained unless its config is for inference; others stay in
    the model. With `state_dict` the layers are those that its keys name, whatever the config's patterns say;
    its values are not read.
    """
    if peft_config.is_prompt_learning:
        raise ConfigError(
            f"{peft_config.peft_type} is a prompt, not a change to layers: use `get_peft_model`"
        )
    inner = users_model(model)
    attach(inner, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, names=state_dict)
    manage.set_adapter(inner, adapter_name, peft_config.inference_mode)
    return model


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """A config of the class that `peft_type` names."""
    return PeftConfig.from_peft_type(**config_dict)


Value = TypeVar("Value")


class _ByType(Mapping[str, Value]):
    """A value for each of some `peft_type`s, looked up when it is asked for, so that no method is imported
    before.
    """

    def __init__(self, find: Callable[[str], Value], types: Iterable[str]) -> None:
        self._find = find
        self._types = tuple(PeftType(name) for name in types)

    def __getitem__(self, peft_type: str) -> Value:
        key = str(getattr(peft_type, "value", peft_type))
        if key not in self._types:
            raise KeyError(peft_type)
        return self._find(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)


def _config(peft_type: str) -> type[PeftConfig]:
    return method_for(peft_type).config


def _tuner(peft_type: str) -> type:
    method = registry.method(peft_type)
    return method.encoder if isinstance(method, PromptMethod) else TUNERS[PeftType(peft_type)]


def _prefix(peft_type: str) -> str:
    return method_for(peft_type).prefix


PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[str, type[PeftConfig]] = _ByType(_config, registry.MODULES)
"""The config class of each method."""
PEFT_TYPE_TO_TUNER_MAPPING: Mapping[str, type] = _ByType(_tuner, registry.MODULES)
"""The class of tuners with adapters of each method; for a prompt, the class of what makes it."""
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: Mapping[str, type] = _ByType(_tuner, TUNERS)
"""The methods whose adapters can act together with others': all that change layers."""
PEFT_TYPE_TO_PREFIX_MAPPING: Mapping[str, str] = _ByType(_prefix, registry.MODULES)
"""How the names of each method's tensors begin."""
