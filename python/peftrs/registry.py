"""Which file holds which method.

A method's module is imported when it is first asked for, and registers itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeVar

from peftrs.errors import ConfigError

MODULES = {
    "LORA": "lora",
    "IA3": "ia3",
    "OFT": "oft",
    "PROMPT_TUNING": "prompt_tuning",
    "P_TUNING": "p_tuning",
    "PREFIX_TUNING": "prefix_tuning",
    "MULTITASK_PROMPT_TUNING": "multitask_prompt_tuning",
    "CPT": "cpt",
    "CARTRIDGE": "cartridge",
    "ADAPTION_PROMPT": "adaption_prompt",
    "TRAINABLE_TOKENS": "trainable_tokens",
}
"""The module under `peftrs.methods` for each `peft_type` that works today."""

VARIANTS = {"DORA": "lora.dora", "QALORA": "lora.qalora", "TOKEN_ROWS": "trainable_tokens"}
"""Methods that no file names: a config of another method asks for them."""

COMING = {
    "ADALORA": ("AdaLoraConfig", "AdaLoraModel"),
    "ADAMSS": ("AdamssConfig", "AdamssModel"),
    "BEFT": ("BeftConfig", "BeftModel"),
    "BOFT": ("BOFTConfig", "BOFTModel"),
    "C3A": ("C3AConfig", "C3AModel"),
    "DEFT": ("DeftConfig", "DeftModel"),
    "DELORA": ("DeloraConfig", "DeloraModel"),
    "FOURIERFT": ("FourierFTConfig", "FourierFTModel"),
    "FROD": ("FrodConfig", "FrodModel"),
    "GLORA": ("GloraConfig", "GloraModel"),
    "GRALORA": ("GraloraConfig", "GraloraModel"),
    "HIRA": ("HiraConfig", "HiraModel"),
    "HRA": ("HRAConfig", "HRAModel"),
    "LILY": ("LilyConfig", "LilyModel"),
    "LN_TUNING": ("LNTuningConfig", "LNTuningModel"),
    "LOHA": ("LoHaConfig", "LoHaModel"),
    "LOKR": ("LoKrConfig", "LoKrModel"),
    "MISS": ("MissConfig", "MissModel"),
    "OSF": ("OSFConfig", "OSFModel"),
    "PEANUT": ("PeanutConfig", "PeanutModel"),
    "POLY": ("PolyConfig", "PolyModel"),
    "PSOFT": ("PsoftConfig", "PsoftModel"),
    "PVERA": ("PveraConfig", "PveraModel"),
    "RANDLORA": ("RandLoraConfig", "RandLoraModel"),
    "ROAD": ("RoadConfig", "RoadModel"),
    "SHADOW": ("ShadowConfig", "ShadowModel"),
    "SHIRA": ("ShiraConfig", "ShiraModel"),
    "SUPERTUNING": ("SupertuningConfig", "SupertuningModel"),
    "TINYLORA": ("TinyLoraConfig", "TinyLoraModel"),
    "UNILORA": ("UniLoraConfig", "UniLoraModel"),
    "VBLORA": ("VBLoRAConfig", "VBLoRAModel"),
    "VERA": ("VeraConfig", "VeraModel"),
    "WAVEFT": ("WaveFTConfig", "WaveFTModel"),
    "XLORA": ("XLoraConfig", "XLoraModel"),
    "Arrow": ("ArrowConfig", "create_arrow_model"),
    "BdLoRA": ("BdLoraConfig",),
    "EVA": ("EvaConfig", "get_eva_state_dict", "initialize_lora_eva_weights"),
    "KaSA": ("KasaConfig",),
    "LoRA-GA": ("LoraGAConfig", "preprocess_loraga"),
    "MonteCLoRA": ("MontecloraConfig", "MontecloraTrainerMixin"),
    "VeLoRA": ("VeloraConfig",),
}
"""What PEFT has and this version lacks, by `peft_type` or a name for people: the names that stand for it
meanwhile.
"""

_methods: dict[str, Any] = {}

MethodClass = TypeVar("MethodClass", bound=type[Any])


def register(method: MethodClass) -> MethodClass:
    """Class decorator: makes the method known under its name."""
    _methods[method.name] = method()
    return method


def method(peft_type: str) -> Any:
    """The `core.method.Method` for a `peft_type`. Raises `ConfigError` if peftrs has none."""
    key = str(getattr(peft_type, "value", peft_type)).upper()
    modules = MODULES | VARIANTS
    if key not in modules:
        raise ConfigError(
            f"peft_type {peft_type!r} is not a method of this version of peftrs; it has {', '.join(MODULES)}"
        )
    if key not in _methods:
        import_module(f"peftrs.methods.{modules[key]}")
    return _methods[key]


def loaded() -> list[Any]:
    """The methods asked for so far, which are all that a model at hand can hold."""
    return list(_methods.values())
