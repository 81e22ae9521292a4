"""Loading an adapter together with the base model that its config names."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from peftrs.config import PeftConfig
from peftrs.errors import ConfigError, listed
from peftrs.hub import cached_file, for_hub
from peftrs.model.peft_model import PeftModel
from peftrs.model.tasks import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

LIBRARIES = ("transformers", "diffusers")
"""Libraries whose model classes a config may name; nothing is ever imported because a file says so."""


class AutoPeftModel:
    """Loads the base model that an adapter's config names, as the class its `auto_mapping` names, and the
    adapter onto it.

    The classes that a config may name are those that transformers and diffusers export at their top.
    """

    base: ClassVar[str | None] = None
    """The class of transformers that loads the base model."""
    kind: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated using"
            f" `{name}.from_pretrained(pretrained_model_name_or_path)`"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base model with the adapter on it. `revision` is the adapter's; keyword arguments also go to
        the base's loader.

        `import_allowlist` can only narrow the libraries that the base's class may come from. Raises
        `ConfigError` where the config names another task, or a class that is none of these libraries' models.
        """
        stated = PeftConfig.from_pretrained(
            pretrained_model_name_or_path, revision=revision, **for_hub(kwargs)
        )
        base_class = cls._base_class(stated, import_allowlist)
        if stated.base_model_name_or_path is None:
            raise ConfigError(
                f"{os.fspath(pretrained_model_name_or_path)}: the config does not say which model the adapter"
                " is for"
            )
        options = {key: value for key, value in kwargs.items() if key != "subfolder"}
        model = base_class.from_pretrained(
            stated.base_model_name_or_path, revision=stated.revision, **options
        )
        _fit_tokenizer(model, pretrained_model_name_or_path, revision, kwargs)
        return cls.kind.from_pretrained(
            model,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **for_hub(kwargs),
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, allowed: list[str] | None) -> Any:
        if cls.base is None:
            if config.task_type is not None:
                fitting = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[str(config.task_type)].__name__.replace(
                    "Peft", "AutoPeft", 1
                )
                raise ConfigError(
                    f"the adapter is for the task {config.task_type}: use {fitting} instead of AutoPeftModel"
                )
            return _mapped(config, allowed)
        if config.task_type is not None:
            expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[str(config.task_type)]
            if expected is not cls.kind:
                raise ConfigError(
                    f"the adapter is for the task {config.task_type}, which {expected.__name__} is for, not"
                    f" {cls.__name__}"
                )
        elif config.auto_mapping is None:
            raise ConfigError(
                "the config names neither a task nor a class of the base model: load that and use PeftModel"
            )
        else:
            return _mapped(config, allowed)
        return getattr(_library("transformers"), cls.base)


def _library(name: str) -> Any:
    """A library from the closed list."""
    if name == "transformers":
        import transformers

        return transformers
    import diffusers

    return diffusers


def _mapped(config: PeftConfig, allowed: list[str] | None) -> Any:
    """The class that `auto_mapping` names, found among what the libraries export, not by importing what it
    says.
    """
    mapping = config.auto_mapping or {}
    module, name = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
    library = module.partition(".")[0]
    libraries = [each for each in LIBRARIES if allowed is None or each in allowed]
    if library not in libraries:
        raise ConfigError(
            f"`auto_mapping` wants a class of {module[:120]!r}; only {listed(libraries)} are looked into"
        )
    found = (
        getattr(_library(library), name, None) if name.isidentifier() and not name.startswith("_") else None
    )
    if not isinstance(found, type) or found.__module__ != module or not hasattr(found, "from_pretrained"):
        raise ConfigError(
            f"`auto_mapping` names {name[:120]!r} of {module[:120]!r}, which {library} does not export as a"
            " model"
        )
    return found


def _fit_tokenizer(
    model: Any, adapter: str | os.PathLike[str], revision: str | None, options: dict[str, Any]
) -> None:
    """Makes the embeddings as long as the vocabulary that was saved with the adapter, where one was."""
    if not hasattr(model, "get_input_embeddings") or cached_file(adapter, "tokenizer_config.json") is None:
        return
    tokenizer = _library("transformers").AutoTokenizer.from_pretrained(
        adapter,
        revision=revision,
        token=options.get("token"),
        trust_remote_code=options.get("trust_remote_code", False),
    )
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For models that continue texts."""

    base = "AutoModelForCausalLM"
    kind = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For models that turn texts into others."""

    base = "AutoModelForSeq2SeqLM"
    kind = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For models that classify whole texts."""

    base = "AutoModelForSequenceClassification"
    kind = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For models that classify tokens."""

    base = "AutoModelForTokenClassification"
    kind = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For models that find answers in texts."""

    base = "AutoModelForQuestionAnswering"
    kind = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For models that turn texts into vectors."""

    base = "AutoModel"
    kind = PeftModelForFeatureExtraction
