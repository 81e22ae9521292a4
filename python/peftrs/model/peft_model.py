"""`PeftModel`: a model with adapters, which is trained, saved and loaded through it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from peftrs.config import CONFIG_NAME, PeftConfig, PeftType, TargetedConfig
from peftrs.core import manage
from peftrs.core.inject import activation, adapters
from peftrs.core.tree import modules
from peftrs.errors import AdapterError, ConfigError, Strict, TargetError, complain
from peftrs.hub import Pushable
from peftrs.io.experts import fused
from peftrs.io.load import LoadReport, load, opened
from peftrs.model import saving, status
from peftrs.model.adapters import Adapters
from peftrs.model.prompting import Prompting, generating
from peftrs.model.tuner import Tuner
from peftrs.planning.attach import attach, whole_or_not

LOADER_OPTIONS = frozenset(
    {
        "device_map",
        "max_memory",
        "offload_buffers",
        "offload_dir",
        "offload_folder",
        "offload_index",
        "use_safetensors",
    }
)
"""Keyword arguments that PEFT's loaders take for models spread over devices; adapters follow their layers
without being told.
"""


class PeftModel(Prompting, Pushable, Adapters):
    """A model with adapters. What it does not know itself, it asks the model inside for.

    Raises `ConfigError` or `TargetError` where the adapter does not fit the model, which is then left as it
    was. A name that is taken is an `AdapterError`; where the process is lenient, the new adapter takes the
    old one's place, with a warning.
    """

    heads: ClassVar[tuple[str, ...]] = ()
    """Names of the layers that this kind of model trains whole beside every adapter."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        strict: Strict = None,
    ) -> None:
        super().__init__()
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        self.base_model = Tuner(model)
        self.load_reports: dict[str, LoadReport] = {}
        if adapter_name in adapters(model):
            complain(f"Adapter with name {adapter_name!r} already exists.", AdapterError)
            # A cell of a notebook run again means the model with this adapter alone under its name.
            self.base_model.delete_adapter(adapter_name)
        self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype, strict=strict)
        if _checkpoints(model):
            self.prepare_model_for_gradient_checkpointing(model)
        if hasattr(getattr(model, "config", None), "pretraining_tp"):
            # Sliced projections read weights past their layers.
            cast(Any, model).config.pretraining_tp = 1

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return self.base_model(*args, **kwargs)
        with manage.mixed(self.get_base_model(), names, _batch(args, kwargs)):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, with its adapters acting, or for every row of the batch that of
        `adapter_names`.
        """
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            with manage.mixed(self.get_base_model(), names, _batch(args, kwargs)):
                return self.generate(*args, **kwargs)
        with generating(self.get_base_model(), args, kwargs) as (inputs, options):
            return cast(Any, self.get_base_model()).generate(*inputs, **options)

    # Adapters.

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the first adapter that acts. Raises `AdapterError` if there is none."""
        if not self.active_adapters:
            raise AdapterError("the model has no active adapter")
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> PeftType:
        """The kind of the first adapter that acts."""
        return PeftType(cast(str, self.active_peft_config.peft_type))

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter acts."""
        state = activation(self.base_model.model)
        return state.enabled and bool(state.active)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names that the adapters' configs give of modules trained whole."""
        names = {name for config in self.peft_config.values() for name in config.modules_to_save or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> Any:
        """The dtype of the model inside, where it says so."""
        return getattr(self.get_base_model(), "dtype", None)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        strict: Strict = None,
    ) -> None:
        """Adds an adapter, not active unless it is the first; the others keep what they train.

        Raises `AdapterError`, `ConfigError` or `TargetError`, with the model left as it was.
        """
        if self.heads and isinstance(peft_config, TargetedConfig):
            named = list(peft_config.modules_to_save or ())
            peft_config.modules_to_save = named + [head for head in self.heads if head not in named]
        attach(
            self.get_base_model(),
            peft_config,
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
            heads=self.heads,
            strict=strict,
        )

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model without its adapters inside the `with`; biases that an adapter trains stay trained, with
        a warning.
        """
        self.base_model.warn_of_biases()
        with manage.disabled(self.get_base_model()):
            yield

    # Files.

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the adapter "default" into the folder, others (or those selected) into folders of their
        names in it.

        `state_dict=` gives the model's tensors, gathered elsewhere.
        `path_initial_model_for_weight_conversion` is the folder of the same adapter as it was before training
        (PiSSA, OLoRA): then what is written is a plain LoRA of twice the rank. Only the main process writes.
        `dtype` is what floating-point tensors are written in, "auto" for what the model itself is in; by
        default what they are. A fingerprint of the model goes into the file, by which loading tells another
        one. Raises `AdapterError` for unknown names, or for `safe_serialization=False`: pickles are not
        written.
        """
        saving.save(
            self,
            save_directory,
            safe_serialization=safe_serialization,
            selected=selected_adapters,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            initial=path_initial_model_for_weight_conversion,
            state_dict=cast("Mapping[str, Tensor] | None", kwargs.pop("state_dict", None)),
            dtype=dtype,
        )

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Writes `README.md`, or brings the header of the one that is there up to date."""
        saving.write_card(self, output_dir)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        strict: Strict = None,
        **kwargs: Any,
    ) -> Self:
        """The model with an adapter from a local folder or repository, as the class that its task type names.

        Everything is checked against the model before a tensor is read: missing, unexpected and misshapen
        tensors are one `CheckpointError` (the first two are a warning with `strict=False` or "warn"), and the
        model is left as it was. What became of each tensor of the file stands in `load_reports`.
        `ephemeral_gpu_offload` has no effect.
        """
        from peftrs.model.tasks import class_for

        if isinstance(model, PeftModel):
            model = model.get_base_model()
        with whole_or_not(model):
            origin = _origin(model_id, kwargs) if config is None else "config"
            config = read_config(model_id, config, is_trainable, kwargs)
            chosen = class_for(config, cls)
            with _blaming(origin):
                # The tensors say what was adapted: an entry that never matched anything is worth a warning,
                # no more.
                loaded = chosen(
                    model,
                    config,
                    adapter_name,
                    autocast_adapter_dtype,
                    low_cpu_mem_usage=True,
                    strict=strict is True,
                )
            loaded._fill(model_id, adapter_name, key_mapping, strict, kwargs)
        if not is_trainable:
            loaded.eval()
        return cast(Self, loaded)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        strict: Strict = None,
        **kwargs: Any,
    ) -> LoadReport:
        """Loads an adapter beside the others, or new tensors into one that is there; which are active stays
        as it is.

        A new adapter is trained if `is_trainable`, active or not.

        Returns what became of each tensor. They go to the devices of their layers, whatever `torch_device`
        says, and nothing is moved to an accelerator on the way, whatever `ephemeral_gpu_offload` says. See
        `from_pretrained` for what is checked.
        """
        with whole_or_not(self.get_base_model()):
            if adapter_name not in self.peft_config:
                config = read_config(model_id, None, is_trainable, kwargs)
                with _blaming(_origin(model_id, kwargs)):
                    self.add_adapter(
                        adapter_name, config, True, autocast_adapter_dtype, strict=strict is True
                    )
                self.set_requires_grad(adapter_name, is_trainable)
            result = self._fill(model_id, adapter_name, key_mapping, strict, kwargs)
        if not is_trainable:
            self.eval()
        return result

    def _fill(
        self,
        model_id: str | os.PathLike[str],
        adapter: str,
        key_mapping: Mapping[str, str] | None,
        strict: Strict,
        options: Mapping[str, Any],
    ) -> LoadReport:
        base, config = self.get_base_model(), cast(TargetedConfig, self.peft_config[adapter])
        if key_mapping is None:
            key_mapping = getattr(base, "_checkpoint_conversion_mapping", None)
        source = opened(base, model_id, key_mapping, **options)
        report = load(self, adapter, config, fused(self, adapter, config, source), strict=strict)
        self.load_reports[adapter] = report
        return report

    # What there is.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are, adapters included."""
        return manage.trainable_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trained, of how many."""
        trained, total = self.get_nb_trainable_parameters()
        share = f"trainable%: {100 * trained / total:.4f}"
        print(f"trainable params: {trained:,d} || all params: {total:,d} || {share}")  # noqa: T201

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """The state of every layer that has adapters."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """The state of the model's adapters as a whole."""
        return status.get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can take the adapter."""
        from peftrs.convert.as_lora import supports

        return supports(self.get_base_model(), adapter_name)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Makes the embeddings' outputs need gradients: checkpointing that re-enters cuts off a graph whose
        inputs need none.
        """
        enable: Any = getattr(model, "enable_input_require_grads", None)
        if enable is not None:
            enable()
        return model


def _checkpoints(model: nn.Module) -> bool:
    """Whether any module recomputes its activations in the backward pass, by the mark that transformers puts
    on it.
    """
    return any(module.__dict__.get("gradient_checkpointing") for _, module in modules(model))


def _origin(model_id: str | os.PathLike[str], options: Mapping[str, Any]) -> str:
    return os.path.join(os.fspath(model_id), options.get("subfolder") or "", CONFIG_NAME)


@contextmanager
def _blaming(origin: str) -> Iterator[None]:
    """Puts the file that a config came from before what is wrong with it on this model."""
    try:
        yield
    except (ConfigError, TargetError) as error:
        raise type(error)(f"{origin}: {error}") from error


def _batch(inputs: tuple[Any, ...], options: Mapping[str, Any]) -> int | None:
    """How many rows a call of a model has, by its first tensor."""
    return next(
        (len(value) for value in (*inputs, *options.values()) if isinstance(value, Tensor) and value.ndim),
        None,
    )


def read_config(
    model_id: str | os.PathLike[str],
    config: PeftConfig | None,
    is_trainable: bool,
    options: Mapping[str, Any],
) -> PeftConfig:
    """The config given, or the one in the folder or repository, for inference unless `is_trainable`."""
    if config is None:
        config = PeftConfig.from_pretrained(
            model_id, **{key: value for key, value in options.items() if key not in LOADER_OPTIONS}
        )
    elif not isinstance(config, PeftConfig):
        raise AdapterError(f"The input config must be a PeftConfig, got {type(config).__name__}")
    config.inference_mode = not is_trainable
    return config
