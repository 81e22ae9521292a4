"""PEFT's dotted names: which modules it has, and what a name means in them (`module:attribute`, or a module
alone).

A name means one thing wherever PEFT has it, so one table serves all modules. The exceptions are the layer
classes, which each method's modules have for themselves: `peftrs.compat.layers` makes those.
"""

from __future__ import annotations

import peftrs

LAYERS = "peftrs.compat.layers"
FUNCTIONAL = "peftrs.compat.functional"
INNER = "peftrs.compat.inner"
OTHER = "peftrs.compat.other"
TASK_VECTORS = "peftrs.convert.task_vectors"


def _in(module: str, names: str) -> dict[str, str]:
    return {name: f"{module}:{name}" for name in names.split()}


NAMES: dict[str, str] = {
    **_in("peftrs", " ".join(peftrs.__all__)),
    "__version__": "peftrs.config:FORMAT_VERSION",
    "BaseTuner": "peftrs.model.tuner:Tuner",
    "BaseTunerLayer": "peftrs.core.layer:AdaptedLayer",
    **_in(LAYERS, "AuxiliaryTrainingWrapper TrainableTokensWrapper"),
    "ModulesToSaveWrapper": "peftrs.core.replace:ReplacedModule",
    **_in(FUNCTIONAL, "cast_adapter_dtype delete_adapter set_adapter set_requires_grad"),
    **_in(
        "peftrs.compat.weight_conversion",
        "build_peft_weight_mapping convert_peft_adapter_state_dict_for_transformers"
        " convert_peft_config_for_transformers",
    ),
    **_in(
        OTHER,
        "BufferDict CONFIG_NAME DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES"
        " INCLUDE_LINEAR_LAYERS_SHORTHAND MIN_TARGET_MODULES_FOR_OPTIMIZATION SAFETENSORS_WEIGHTS_NAME"
        " SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME WEIGHTS_NAME _get_submodules check_adapters_to_merge"
        " check_target_module_exists dequantize_module_weight disable_input_dtype_casting factorization"
        " fsdp_auto_wrap_policy gather_params_ctx init_empty_weights replicate_layers transpose",
    ),
    **_in(
        "peftrs.planning.defaults",
        "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"
        " TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING"
        " TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
        " TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING",
    ),
    **_in(
        "peftrs.compat.helpers",
        "DoraCaching check_if_peft_model rescale_adapter_scale update_forward_signature"
        " update_generate_signature update_signature",
    ),
    **_in(
        "peftrs.convert.hotswap",
        "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict"
        " prepare_model_for_compiled_hotswap",
    ),
    **_in(
        INNER,
        "MIN_EXPECTED_CONFIG_KEYS _get_no_split_modules check_deepspeed_zero3_enabled"
        " check_file_exists_on_hf_hub check_import_allowlist clone_module dequantize_bnb_weight"
        " find_parameter_name_by_module get_bnb_param_type get_default_import_allowlist get_device_map"
        " get_layer_device_map get_pattern_key get_quantization_config inspect_matched_modules"
        " is_gptqmodel_awq_layer is_gptqmodel_quant_linear match_target_against_key onload_layer"
        " register_peft_method skip_init_on_device starcoder_model_postprocess_past_key_value str_to_bool",
    ),
    "BasePromptEncoder": "peftrs.core.prompt:Encoder",
    "LoraFAOptimizer": "peftrs.train.lora_fa:LoraFAOptimizer",
    "PeftConfigMixin": "peftrs.config:PeftConfig",
    "KappaTuneSelector": "peftrs.planning.choose_layers:KappaTuneSelector",
    "MixedModel": "peftrs.model.tuner:Tuner",
    "MontecloraTrainerMixin": "peftrs.compat.coming:MontecloraTrainerMixin",
    "PEFT_TYPE_TO_PREFIX_MAPPING": "peftrs.model.create:PEFT_TYPE_TO_PREFIX_MAPPING",
    **_in(
        "peftrs.compat.utilities",
        "ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES _freeze_adapter _get_batch_size _get_input_embeddings_name"
        " _is_valid_match _prepare_prompt_learning_config _set_adapter id_tensor_storage infer_device"
        " map_cache_to_layer_device_map",
    ),
    **_in(
        "peftrs.optimizers", "create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer"
    ),
    **_in(
        TASK_VECTORS,
        "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_based_pruning"
        " magnitude_prune prune random_pruning reshape_weight_task_tensors task_arithmetic ties",
    ),
}
"""What every name means."""

METHODS = {
    "adalora": "AdaLora", "adamss": "Adamss", "adaption_prompt": "AdaptionPrompt", "beft": "Beft",
    "boft": "BOFT", "c3a": "C3A",
    "cartridge": "Cartridge", "cpt": "CPT", "deft": "Deft", "delora": "Delora", "fourierft": "FourierFT",
    "frod": "Frod",
    "glora": "Glora", "gralora": "Gralora", "hira": "Hira", "hra": "HRA", "ia3": "IA3", "lily": "Lily",
    "ln_tuning": "LNTuning",
    "loha": "LoHa", "lokr": "LoKr", "lora": "Lora", "miss": "Miss",
    "multitask_prompt_tuning": "MultitaskPromptTuning",
    "oft": "OFT", "osf": "OSF", "p_tuning": "PromptEncoder", "peanut": "Peanut", "poly": "Poly",
    "prefix_tuning": "PrefixTuning",
    "prompt_tuning": "PromptTuning", "psoft": "Psoft", "pvera": "Pvera", "randlora": "RandLora",
    "road": "Road",
    "shadow": "Shadow", "shira": "Shira", "supertuning": "Supertuning", "tinylora": "TinyLora",
    "trainable_tokens": "TrainableTokens", "unilora": "UniLora", "vblora": "VBLoRA", "vera": "Vera",
    "waveft": "WaveFT",
    "xlora": "XLora",
}  # fmt: skip
"""How the names of a method's classes begin, by its folder; its `peft_type` is the folder's name in
capitals.
"""

MODULES = {
    "peft", "peft.auto", "peft.config", "peft.functional", "peft.helpers", "peft.import_utils",
    "peft.mapping",
    "peft.mapping_func", "peft.mixed_model", "peft.optimizers", "peft.optimizers.loraplus",
    "peft.optimizers.lorafa",
    "peft.optimizers.riemannian", "peft.peft_model", "peft.tuners", "peft.tuners._buffer_dict",
    "peft.tuners.lycoris_utils",
    "peft.tuners.mixed", "peft.tuners.mixed.model", "peft.tuners.tuners_utils", "peft.utils",
    "peft.utils.constants",
    "peft.utils.error", "peft.utils.hotswap", "peft.utils.incremental_pca", "peft.utils.integrations",
    "peft.utils.loftq_utils",
    "peft.utils.merge_utils", "peft.utils.other", "peft.utils.peft_types", "peft.utils.quantization_utils",
    "peft.utils.save_and_load", "peft.utils.transformers_weight_conversion", "peft.utils.warning",
}  # fmt: skip
MODULES |= {
    f"peft.tuners.{folder}{part}"
    for folder in METHODS
    for part in ("", ".bnb", ".config", ".layer", ".model")
}
MODULES |= {
    f"peft.tuners.lora.{part}"
    for part in (
        "aqlm", "arrow", "awq", "conversion", "corda", "dora", "eetq", "eva", "gptq", "hqq", "inc",
        "intruders", "loraga",
        "monteclora", "te", "torchao", "tp_layer", "variants", "velora",
    )
}  # fmt: skip
"""Every module that can be imported."""

HOMES = {"peft.functional": FUNCTIONAL, "peft.import_utils": "peftrs.compat.imports"}
"""Modules that one of ours is the whole of."""
