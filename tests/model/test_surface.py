"""PEFT's public names are here: each that concerns what exists, with PEFT's parameters, and placeholders for
what is to come.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftrs
from peftrs import ConfigError, registry
from peftrs.compat import coming
from peftrs.compat.finder import Alias
from peftrs.compat.parts import PARTS, Defaults, Part, part
from tests.model.tiny import llama, logits, shake

SURFACES = {
    "peft": peft.__all__,
    "peft.tuners": import_module("peft.tuners").__all__,
    "peft.functional": import_module("peft.functional").__all__,
    "peft.optimizers": import_module("peft.optimizers").__all__,
    "peft.utils": import_module("peft.utils").__all__,
    "peft.helpers": [
        "DoraCaching", "KappaTuneSelector", "MontecloraTrainerMixin", "check_if_peft_model",
        "disable_input_dtype_casting",
        "find_kappa_target_modules", "rescale_adapter_scale", "update_forward_signature",
        "update_generate_signature",
        "update_signature",
    ],
    "peft.utils.hotswap": [
        "check_hotswap_configs_compatible", "hotswap_adapter", "hotswap_adapter_from_state_dict",
        "prepare_model_for_compiled_hotswap",
    ],
    "peft.utils.save_and_load": [
        "get_base_model_state_dict", "get_peft_model_state_dict", "load_peft_weights",
        "set_base_model_state_dict",
        "set_peft_model_state_dict",
    ],
    "peft.utils.transformers_weight_conversion": [
        "build_peft_weight_mapping", "convert_peft_adapter_state_dict_for_transformers",
        "convert_peft_config_for_transformers",
    ],
    "peft.utils.merge_utils": [
        "calculate_majority_sign_mask", "dare_linear", "dare_ties", "disjoint_merge",
        "magnitude_based_pruning",
        "magnitude_prune", "prune", "random_pruning", "reshape_weight_task_tensors", "task_arithmetic",
        "ties",
    ],
}  # fmt: skip
"""The names that each module of PEFT offers."""
if find_spec("transformers.conversion_mapping") is None:
    del SURFACES["peft.utils.transformers_weight_conversion"]  # PEFT's own needs transformers 5


HOMES = (
    "config", "helpers", "import_utils", "peft_model", "tuners.tuners_utils", "utils.constants",
    "utils.integrations",
    "utils.loftq_utils", "utils.other", "utils.peft_types", "utils.quantization_utils", "utils.save_and_load",
)  # fmt: skip
"""Modules whose own functions, classes and constants are imported from there, whatever they list."""


def own_names(module: str) -> list[str]:
    """The public functions, classes and constants that a module of PEFT defines."""
    held = vars(import_module(module))
    tables = {
        name
        for name, value in held.items()
        if name.isupper() and isinstance(value, str | int | dict | list | tuple | set)
    }
    return sorted(
        name
        for name, value in held.items()
        if name[0] != "_" and (name in tables or getattr(value, "__module__", None) == module)
    )


for home in HOMES:
    found = SURFACES.setdefault(f"peft.{home}", [])
    found += [name for name in own_names(f"peft.{home}") if name not in found]


def ours(module: str, name: str) -> Any:
    """What the alias gives for a name, or None."""
    return getattr(Alias(module), name, None)


def lacking(module: str) -> list[str]:
    return [name for name in SURFACES[module] if ours(module, name) is None]


def works(module: str) -> list[str]:
    """The names of a module that are more than placeholders."""
    to_come = (coming.Coming, Part, Defaults)
    return [
        name
        for name in SURFACES[module]
        if name not in lacking(module) and not isinstance(ours(module, name), to_come)
    ]


def test_the_share_of_names(record_property: Callable[[str, object], None]) -> None:
    for module, names in SURFACES.items():
        share = (
            f"{len(works(module))} of {len(names)} work,"
            f" {len(names) - len(lacking(module)) - len(works(module))} are to come"
        )
        record_property(module, share)
        print(f"{module}: {share}, missing: {lacking(module)}")  # noqa: T201
    assert [f"{module}.{name}" for module in SURFACES for name in lacking(module)] == []


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


FUNCTIONS = [
    (module, name)
    for module in SURFACES
    for name in works(module)
    if inspect.isroutine(getattr(import_module(module), name, None))
]


@pytest.mark.parametrize(("module", "name"), FUNCTIONS, ids=lambda one: str(one))
def test_functions_take_what_theirs_take(module: str, name: str) -> None:
    theirs, own = parameters(getattr(import_module(module), name)), parameters(ours(module, name))
    assert [one for one in own if one in theirs] == [
        one for one in theirs if not one.endswith("kwargs") or one in own
    ]
    assert own[: len(theirs)] == theirs[: len(own)] or set(theirs) - set(own) <= {
        "hf_hub_download_kwargs",
        "kwargs",
    }


CONFIGS = [
    name
    for name in works("peft")
    if name.endswith("Config") and name not in ("PeftConfig", "PromptLearningConfig")
]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_have_their_fields_and_defaults(name: str) -> None:
    fields = {
        one: parameter.default for one, parameter in inspect.signature(getattr(peft, name)).parameters.items()
    }
    own = {
        one: parameter.default
        for one, parameter in inspect.signature(getattr(peftrs, name)).parameters.items()
    }
    assert set(fields) <= set(own)
    plain = {one for one, value in fields.items() if value is None or isinstance(value, int | float | str)}
    assert {one: own[one] for one in plain} == {one: fields[one] for one in plain}


MODELS = ["PeftModel", "PeftMixedModel", *(name for name in works("peft") if name.startswith("PeftModelFor"))]


@pytest.mark.parametrize("name", MODELS)
def test_models_have_their_methods(name: str) -> None:
    theirs, own = getattr(peft, name), getattr(peftrs, name)(llama(), peftrs.LoraConfig())
    public = {one for one in vars(theirs) if not one.startswith("_")}
    assert {one for one in public if not hasattr(own, one)} <= {
        "set_modules_to_save",
        "special_peft_forward_args",
    }


def test_tuners_are_made_and_told_by_their_method() -> None:
    tuner = peftrs.LoraModel(llama(), {"one": peftrs.LoraConfig()}, "one")
    assert isinstance(tuner, peftrs.LoraModel)
    assert not isinstance(tuner, peftrs.IA3Model)
    assert not isinstance(tuner.model, peftrs.LoraModel)
    assert (tuner.prefix, peftrs.LoraModel.prefix) == ("lora_", "lora_")
    assert peftrs.LoraModel.target_module_mapping["llama"] == ("q_proj", "v_proj")
    assert tuner.active_adapters == ["one"]


def test_mixed_adapters_act_together(tmp_path: Path) -> None:
    model = peftrs.get_peft_model(llama(), peftrs.LoraConfig(init_lora_weights=False), mixed=True)
    assert type(model) is peftrs.PeftMixedModel
    model.add_adapter("other", peftrs.IA3Config())
    model.set_adapter(["default", "other"])
    shake(model)
    both = logits(model)
    model.save_pretrained(tmp_path)
    again = peftrs.PeftMixedModel.from_pretrained(llama(), tmp_path)
    assert type(again) is peftrs.PeftMixedModel
    again.load_adapter(tmp_path / "other", "other")
    again.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(again), both, rtol=0, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    again.delete_adapter(["default", "other"])
    assert torch.equal(logits(again), logits(llama()))


@pytest.mark.parametrize("name", sorted(coming.NAMES))
def test_what_is_to_come_says_so(name: str) -> None:
    found = getattr(coming, name)
    assert not isinstance(object(), found)
    with pytest.raises(ConfigError, match=f"`{name}`: .* is not built yet in peftrs"):
        found(1, r=2)
    assert getattr(coming, name) is found


@pytest.mark.parametrize("name", sorted(PARTS))
def test_parts_of_pefts_methods_say_so(name: str) -> None:
    assert not isinstance(torch.nn.Linear(1, 1), part(name))
    with pytest.raises(ConfigError, match=f"`{name}` is a part that PEFT's methods are made of"):
        part(name)(1, r=2)


def test_defaults_of_methods_to_come_say_so() -> None:
    table = part("TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING")
    assert (len(table), "llama" in list(table)) == (0, False)
    with pytest.raises(ConfigError, match="LN_TUNING is not built yet"):
        _ = table["llama"]
    assert part("TRANSFORMERS_MODELS_TO_NOTHING_TARGET_MODULES_MAPPING") is None


def test_names_of_pefts_modules_are_in_ours() -> None:
    for name in ("functional", "helpers", "optimizers", "utils", "utils.hotswap"):
        module = import_module(f"peftrs.{name}")
        for one in SURFACES[f"peft.{name}"]:
            assert getattr(module, one) is ours(f"peft.{name}", one), one
        with pytest.raises(AttributeError):
            _ = module.nothing
    with pytest.raises(AttributeError, match="install"):
        _ = import_module("peftrs.utils").other


def test_every_method_works_or_is_to_come() -> None:
    types = {peft_type.value for peft_type in peftrs.PeftType}
    assert types == {one.value for one in peft.PeftType}
    assert types == set(registry.MODULES) | {name for name in registry.COMING if name in types}
    assert set(registry.MODULES).isdisjoint(registry.COMING)
    assert (
        set(peftrs.PEFT_TYPE_TO_TUNER_MAPPING)
        == set(peftrs.PEFT_TYPE_TO_CONFIG_MAPPING)
        == set(registry.MODULES)
    )
    for peft_type, tuner in peftrs.PEFT_TYPE_TO_TUNER_MAPPING.items():
        assert tuner.__name__ == peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(peft_type)].__name__
    with pytest.raises(KeyError):
        peftrs.PEFT_TYPE_TO_TUNER_MAPPING["LOHA"]


def test_a_name_that_nobody_has_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchConfig"):
        _ = coming.NoSuchConfig


def test_errors_are_theirs() -> None:
    assert issubclass(peftrs.NoMatchingPeftModuleError, peftrs.PeftError)
    assert issubclass(peftrs.NoMatchingPeftModuleError, ValueError)
    assert issubclass(peftrs.PeftWarning, UserWarning)
    with pytest.raises(peftrs.NoMatchingPeftModuleError):
        peftrs.get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(2, 2)), peftrs.LoraConfig(target_modules=["nothing"])
        )
