"""PEFT's dotted names as a table: for each module, what its names are here (`module:attribute`, or a module alone)."""

from __future__ import annotations

import peftrs
from peftrs.model import functional

LAYERS = "peftrs.compat.layers"
FUNCTIONAL = "peftrs.model.functional"
CONVERSION = "peftrs.compat.weight_conversion"

ROOT = {name: f"peftrs:{name}" for name in peftrs.__all__} | {"__version__": "peftrs.config:FORMAT_VERSION"}

WRAPPERS = {
    "AuxiliaryTrainingWrapper": "peftrs.core.replace:ReplacedModule",
    "ModulesToSaveWrapper": "peftrs.core.replace:ReplacedModule",
}

STATE: dict[str, str] = {
    name: ROOT[name] for name in ("get_peft_model_state_dict", "set_peft_model_state_dict", "load_peft_weights")
}

CONSTANTS = {
    name: f"{LAYERS}:{name}"
    for name in ("CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "_get_submodules")
}

LORA = {name: f"{LAYERS}:{name}" for name in ("LoraLayer", "Linear", "Embedding", "Conv2d", "Conv3d", "ParamWrapper")}

TUNERS = {
    "BaseTuner": "peftrs.model.tuner:Tuner",
    "BaseTunerLayer": "peftrs.core.layer:AdaptedLayer",
    **{name: f"{FUNCTIONAL}:{name}" for name in ("cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad")},
}

MERGING = {
    name: f"peftrs.methods.task_vectors:{name}"
    for name in (
        "calculate_majority_sign_mask", "dare_linear", "dare_ties", "disjoint_merge", "magnitude_based_pruning", "magnitude_prune",
        "prune", "random_pruning", "reshape_weight_task_tensors", "task_arithmetic", "ties",
    )
}  # fmt: skip

MODULES: dict[str, dict[str, str]] = {
    "peft": ROOT,
    "peft.auto": ROOT,
    "peft.config": ROOT,
    "peft.mapping": ROOT,
    "peft.mapping_func": ROOT,
    "peft.peft_model": ROOT,
    "peft.functional": {name: f"{FUNCTIONAL}:{name}" for name in functional.__all__},
    "peft.helpers": {"disable_input_dtype_casting": f"{LAYERS}:disable_input_dtype_casting"},
    "peft.utils": {**ROOT, **WRAPPERS, **STATE, **CONSTANTS},
    "peft.utils.other": {**WRAPPERS, **CONSTANTS},
    "peft.utils.constants": CONSTANTS,
    "peft.utils.merge_utils": MERGING,
    "peft.utils.save_and_load": STATE,
    "peft.utils.transformers_weight_conversion": {"build_peft_weight_mapping": f"{CONVERSION}:build_peft_weight_mapping"},
    "peft.tuners": {**ROOT, **LORA},
    "peft.tuners.tuners_utils": TUNERS,
    "peft.tuners.lora": {**ROOT, **LORA},
    "peft.tuners.lora.layer": LORA,
    "peft.tuners.lora.config": ROOT,
    "peft.tuners.lora.conversion": ROOT,
    "peft.tuners.lora.model": ROOT,
    "peft.tuners.ia3": ROOT,
    "peft.tuners.oft": ROOT,
    "peft.tuners.loha": {},
    "peft.tuners.loha.layer": {"LoHaLayer": f"{LAYERS}:LoHaLayer"},
    "peft.tuners.lokr": {},
    "peft.tuners.lokr.layer": {"LoKrLayer": f"{LAYERS}:LoKrLayer"},
}
