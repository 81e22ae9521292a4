"""Adapter configs: plain dataclasses whose types the Rust core checks, read from and written to
`adapter_config.json`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Self, cast

from peftrs import _native, registry
from peftrs.errors import ConfigError, PeftrsWarning, UnfitError
from peftrs.hub import Pushable, for_hub, local_folder

CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = "0.21.2"
"""The version of PEFT whose files ours are; written as `peft_version`."""


class PeftType(StrEnum):
    """The kinds of adapter that files name; `peftrs.registry` says which of them work."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    PVERA = "PVERA"
    FROD = "FROD"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"
    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"


class TaskType(StrEnum):
    """The tasks that a model's head can be for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


RUNTIME: dict[str, bool] = {"runtime": True}
"""Metadata of a field that is never written to a file."""
NO_FIELD: frozenset[str] = frozenset()
"""What a list of names is in configs of a kind that has no such field, where None is a field left unset."""


class Absent:
    """The settings that only some kinds of config have as fields, with what holds for all other kinds.

    This is no dataclass, so that they are in no file and no constructor; a field of the same name overrides
    them. Code asks any config for any of them, and never whether a config has one.
    """

    target_modules: str | Collection[str] | None = None
    target_parameters: Collection[str] | None = NO_FIELD
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    feedforward_modules: str | Collection[str] | None = NO_FIELD
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool | None = None
    """None: no tie is kept, and nobody could ask for it, where False is that nobody did."""
    fan_in_fan_out: bool | None = None
    """None: the config does not state how layers store their weights."""
    bias: str = "none"
    init_weights: bool | str | None = True
    use_dora: bool = False
    use_rslora: bool = False
    lora_bias: bool = False
    lora_dropout: float = 0.0
    encoder_hidden_size: int | None = 0
    runtime_config: Any = None


@dataclass
class PeftConfig(Absent, Pushable):
    """What every adapter config holds. Raises `ConfigError` on construction, listing every fault at once."""

    sources: ClassVar[tuple[str, ...]] = ()
    """Fields that name files and the like which are read when an adapter is made, and never when one is
    loaded.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self.peft_version = self.peft_version or FORMAT_VERSION
        tasks = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in tasks:
            raise ConfigError(f"task_type {self.task_type!r} is not one of {', '.join(tasks)}")
        if self.peft_type is not None:
            self.peft_type = PeftType(self.peft_type)
            self.check()

    def check(self) -> None:
        """Checks types and limits, as if the config were about to be written. Raises `ConfigError`."""
        try:
            text = json.dumps(self.to_dict())
        except TypeError as error:
            raise ConfigError(
                f"{type(self).__name__}: {error}; configs hold plain numbers, strings, lists and dicts"
            ) from None
        for warning in _native.check_config(text, type(self).__name__):
            if not warning.startswith(tuple(f"`{name}`" for name in self.sources)):
                warnings.warn(warning, PeftrsWarning, stacklevel=4)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the adapter is a learned prompt rather than a change to layers."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the adapter is LLaMA-Adapter's."""
        return self.peft_type == PeftType.ADAPTION_PROMPT

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, sets in sorted order, without those that live only at run time."""
        return {
            item.name: _json_value(getattr(self, item.name))
            for item in fields(self)
            if not item.metadata.get("runtime")
        }

    def to_json(self) -> str:
        """The text of `adapter_config.json`: the same bytes for the same config."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes `adapter_config.json` into the folder, atomically; `auto_mapping_dict` fills that field
        first.
        """
        if kwargs.get("auto_mapping_dict") is not None:
            self.auto_mapping = kwargs["auto_mapping_dict"]
        _native.write_config(os.fspath(save_directory), self.to_json())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """The config in a local folder or repository, as the class that its `peft_type` names.

        Keyword arguments that are fields replace what the file says; others, which libraries hand to all that
        they load, mean nothing here. Raises `CheckpointError` for an unreadable file, `ConfigError` for one
        whose fields are wrong.
        """
        hub = for_hub(kwargs)
        folder = local_folder(pretrained_model_name_or_path, [CONFIG_NAME], subfolder, **hub)
        options = {key: value for key, value in kwargs.items() if key not in hub}
        text, notes = _native.read_config(folder)
        origin = os.path.join(folder, CONFIG_NAME)
        for note in notes:
            warnings.warn(f"{origin}: {note}", PeftrsWarning, stacklevel=2)
        values = json.loads(text)
        if values.get("peft_type") is None:
            raise _nameless(origin)
        config = cls.from_values(values, origin, **options)
        config.check_file(values, origin)
        return config

    def check_file(self, values: dict[str, Any], origin: str) -> None:
        """Raises `ConfigError` if a file with these values stands for tensors whose meaning nobody can tell;
        most kinds: never.
        """

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The values in a config file, unchecked by class, but for `runtime_config`, which is for whoever
        runs it to set.
        """
        with open(path_json_file, encoding="utf-8") as file:
            values: dict[str, Any] = json.load(file)
        values.pop("runtime_config", None)
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Self:
        """A config of the class that `peft_type` names."""
        return cls.from_values(kwargs, cls.__name__)

    @classmethod
    def from_values(cls, values: dict[str, Any], origin: str, **replaced: Any) -> Self:
        """A config from the values of a file. Unknown keys are named in one warning and left out."""
        peft_type = values.get("peft_type")
        if peft_type is None and cls in (PeftConfig, TargetedConfig, LayeredConfig, PromptLearningConfig):
            raise _nameless(origin)
        if peft_type not in (None, *PeftType):
            raise ConfigError(f"{origin}: peft_type {peft_type!r} is unknown")
        chosen = cls if peft_type is None else cast(type[Self], registry.method(peft_type).config)
        known = {item.name for item in fields(chosen) if not item.metadata.get("runtime")}
        values = values | {name: value for name, value in replaced.items() if name in known}
        if unknown := sorted(set(values) - known):
            warnings.warn(
                f"{origin}: unknown keys {unknown} are left out; a newer library may have written them",
                PeftrsWarning,
                stacklevel=3,
            )
        kept = {key: value for key, value in values.items() if key in known and key != "peft_type"}
        try:
            return chosen(**kept)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None


@dataclass
class TargetedConfig(PeftConfig):
    """A config that names the layers to change.

    The patterns' meaning is Python's `re`; see the README on targeting.
    """

    pattern_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that map patterns to values for the layers that match."""

    target_modules: str | list[str] | set[str] | None = None
    exclude_modules: str | list[str] | set[str] | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set, frozenset)):
                setattr(self, name, set(value))
        super().__post_init__()


NO_TARGETS = "dummy-target-modules"
"""What `target_modules` says when no layers are changed: only whole modules or token rows are trained, or a
prompt.
"""


@dataclass
class PromptLearningConfig(TargetedConfig):
    """A config of a prompt: virtual tokens before the text, or keys and values before those of each
    attention.

    Sizes that are None are filled in from the model's own config. Layers are never targets here, so files do
    not name any.
    """

    target_modules: str | list[str] | set[str] | None = field(
        default=NO_TARGETS, init=False, metadata=RUNTIME
    )
    exclude_modules: str | list[str] | set[str] | None = field(default=None, init=False, metadata=RUNTIME)
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    @property
    def is_prompt_learning(self) -> bool:
        return True


@dataclass
class LayeredConfig(TargetedConfig):
    """A config that can also choose among the numbered layers of a model."""

    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = []
        if isinstance(self.target_modules, str):
            if self.layers_to_transform is not None:
                faults.append(
                    "`layers_to_transform` has no effect when `target_modules` is a string: put it in the"
                    " pattern"
                )
            if self.layers_pattern is not None:
                faults.append(
                    "`layers_pattern` has no effect when `target_modules` is a string: put it in the pattern"
                )
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            faults.append("`layers_pattern` says where layer numbers stand and needs `layers_to_transform`")
        if faults:
            raise ConfigError("; ".join(faults))


def _nameless(origin: str) -> UnfitError:
    return UnfitError(f"{origin}: has no `peft_type`, so nobody knows what kind of adapter this is")


def _json_value(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, StrEnum):
        return value.value
    return value


__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "NO_FIELD",
    "NO_TARGETS",
    "RUNTIME",
    "Absent",
    "LayeredConfig",
    "PeftConfig",
    "PeftType",
    "PromptLearningConfig",
    "TargetedConfig",
    "TaskType",
]
