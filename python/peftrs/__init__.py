"""Parameter-efficient fine-tuning for PyTorch with a Rust core.

Importing the package loads neither torch nor transformers: a public name's module is imported when the name
is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from peftrs._native import __version__
from peftrs.registry import COMING

_MODULES = {
    "config": ("PeftConfig", "PeftType", "PromptLearningConfig", "TaskType"),
    "errors": (
        "AdapterError", "CheckpointError", "ConfigError", "MergeError", "NoMatchingPeftModuleError",
        "PeftError", "PeftWarning",
        "PeftrsError", "PeftrsWarning", "StorageError", "TargetError", "is_strict", "set_strict",
    ),
    "io.checkpoint": ("load_peft_weights",),
    "io.state": ("get_peft_model_state_dict", "set_peft_model_state_dict"),
    "methods.lora.inits.loftq": ("LoftQConfig",),
    "methods.ia3": ("IA3Config",),
    "methods.lora": ("LoraConfig", "LoraRuntimeConfig"),
    "methods.oft": ("OFTConfig",),
    "methods.adaption_prompt": ("AdaptionPromptConfig",),
    "methods.cartridge": (
        "CartridgeConfig", "CartridgeEncoder", "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
        "prompt_embeddings_from_past_key_values",
    ),
    "methods.cpt": ("CPTConfig", "CPTEmbedding"),
    "methods.multitask_prompt_tuning": (
        "MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit",
    ),
    "methods.p_tuning": ("PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "methods.prefix_tuning": ("PrefixEncoder", "PrefixTuningConfig"),
    "methods.prompt_tuning": ("PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"),
    "methods.trainable_tokens": ("TrainableTokensConfig",),
    "convert.as_lora": ("convert_to_lora", "save_as_lora"),
    "model.auto": (
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "model.base_state": ("cast_mixed_precision_params", "get_base_model_state_dict",
    "set_base_model_state_dict"),
    "convert.cartridges": ("compose_cartridge_adapters",),
    "convert.extract": ("extract_lora",),
    "planning.choose_layers": ("find_kappa_target_modules",),
    "model.kbit": ("prepare_model_for_kbit_training",),
    "convert.loftq": ("replace_lora_weights_loftq",),
    "model.create": (
        "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING",
        "get_peft_config",
        "get_peft_model", "inject_adapter_in_model",
    ),
    "model.peft_model": ("PeftModel",),
    "planning.preview": ("TargetPlan", "plan"),
    "model.status": ("TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"),
    "model.tasks": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PeftMixedModel", "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
    ),
    "model.tuners": ("AdaptionPromptModel", "IA3Model", "LoraModel", "OFTModel", "TrainableTokensModel"),
    "compat.utilities": (
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING", "bloom_model_postprocess_past_key_value",
        "shift_tokens_right",
    ),
    "compat.coming": tuple(
        name for names in COMING.values() for name in names if name != "MontecloraTrainerMixin"
    ),
}  # fmt: skip
"""Every public name, by the module that has it."""

_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604 (the table's keys are strings)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'peftrs' has no attribute {name!r}")
    value = getattr(import_module(f"peftrs.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
