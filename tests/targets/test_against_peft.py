"""Selection on the module names of real models, held to the functions by which PEFT selects."""

import re
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.ia3 import IA3Model
from peft.tuners.tuners_utils import (
    _ExcludedModule,
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key
from torch import nn

from peftrs import _native

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=12)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig()),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config()),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(num_hidden_layers=3)),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig()),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig()),
    "unet": lambda: diffusers.UNet2DConditionModel(),
    "bare": lambda: transformers.LlamaModel(transformers.LlamaConfig(num_hidden_layers=3)),
}


@cache
def model(kind: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[kind]()


@cache
def names(kind: str) -> list[str]:
    return [name for name, _ in model(kind).named_modules()]


@cache
def leaves(kind: str) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names(kind) if name})


def settings_of(**values: Any) -> Any:
    """The fields that PEFT's functions look at."""
    fields = (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "target_parameters",
    )
    return SimpleNamespace(**{**dict.fromkeys(fields), "task_type": None, **values})


def peft_targets(kind: str, config: Any) -> tuple[list[str], list[str]]:
    """What PEFT selects, and what its `exclude_modules` takes out."""
    found = {name: check_target_module_exists(config, name) for name in names(kind) if name}
    unsaved = SimpleNamespace(**{**vars(config), "modules_to_save": None})
    out = [name for name in found if isinstance(check_target_module_exists(unsaved, name), _ExcludedModule)]
    return [name for name, result in found.items() if result], out


def select(kind: str, config: Any, **more: Any) -> _native.Selection:
    layers, pattern = config.layers_to_transform, config.layers_pattern
    return _native.select(
        names(kind),
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=[layers] if isinstance(layers, int) else layers,
        layers_pattern=[pattern] if isinstance(pattern, str) else pattern,
        modules_to_save=config.modules_to_save,
        **more,
    )


def top_level(kind: str, config: Any) -> set[str]:
    """What we select beyond PEFT: its expression for the number of a layer wants something before the list of
    layers.
    """
    if config.layers_pattern or not config.layers_to_transform:
        return set()
    wider = SimpleNamespace(**{**vars(config), "layers_to_transform": None})
    candidates = [name for name in peft_targets(kind, wider)[0] if not re.match(r".*?\.[^.]*\.\d+\.", name)]
    numbers = {name: re.match(r"[^.]+\.(\d+)\.", name) for name in candidates}
    return {name for name, match in numbers.items() if match and int(match[1]) in config.layers_to_transform}


kinds = st.sampled_from(sorted(MODELS))


@st.composite
def entries(draw: st.DrawFn, kind: str, least: int = 0) -> list[str]:
    """Names and ends of names of the model, and some that are neither."""
    chosen = draw(st.lists(st.sampled_from(names(kind)[1:]), min_size=least, max_size=6))
    cut = [name.split(".", draw(st.integers(0, 8)))[-1] for name in chosen]
    return cut + draw(
        st.lists(st.sampled_from([*leaves(kind)[:6], "q", "proj", "no_such_module"]), max_size=3)
    )


@st.composite
def expressions(draw: st.DrawFn, kind: str) -> str:
    """Expressions as people write them for this model."""
    ends = [re.escape(end) for end in draw(st.lists(st.sampled_from(leaves(kind)), min_size=1, max_size=4))]
    middle = draw(
        st.sampled_from(
            [
                r".*\.",
                r".*",
                r".*\.\d+\..*",
                r".*\.[0-2]\..*\.",
                r"(?!.*(?:decoder|head)).*\.",
                r"(?:.+\.)?",
                r"[^.]+\.",
            ]
        )
    )
    return middle + draw(st.sampled_from(["({})", "(?:{})", "({})$", "(?=({})$).*"])).format("|".join(ends))


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, Any]:
    kind = draw(kinds)
    config = settings_of()
    if draw(st.booleans()):
        config.target_modules = draw(expressions(kind))
    else:
        config.target_modules = draw(entries(kind))
        layers = st.lists(st.integers(0, 12), max_size=4)
        config.layers_to_transform = draw(st.none() | layers | st.integers(0, 12))
        known = [
            "layers",
            "layer",
            "h",
            "block",
            "blocks",
            "encoder.layers",
            r"decoder\.layers",
            "(encoder|decoder).block",
            "no_such",
        ]
        if config.layers_to_transform is not None:
            config.layers_pattern = draw(
                st.none() | st.sampled_from(known) | st.lists(st.sampled_from(known), max_size=3)
            )
    config.exclude_modules = draw(st.none() | entries(kind) | expressions(kind))
    config.modules_to_save = draw(st.none() | entries(kind))
    return kind, config


@given(configs())
def test_the_same_modules_are_selected_and_excluded(drawn: tuple[str, Any]) -> None:
    kind, config = drawn
    if isinstance(config.layers_to_transform, int):
        # PEFT takes one number in code; our selection has it as a list.
        config.layers_to_transform = [config.layers_to_transform]
    targets, excluded = peft_targets(kind, config)
    selection = select(kind, config)
    assert set(selection.targets) - set(targets) == top_level(kind, config)
    assert [name for name in selection.targets if name in targets] == targets
    assert selection.excluded == excluded


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_all_linear_is_what_peft_makes_of_it(kind: str, task: str | None) -> None:
    config = settings_of(target_modules="All-Linear", task_type=task)
    linear = sorted(
        _maybe_include_all_linear_layers(
            settings_of(target_modules="all-linear", task_type=task), model(kind)
        ).target_modules
    )
    assert len(linear) > 10
    targets, _ = peft_targets(kind, settings_of(target_modules=linear))
    selection = select(kind, config, linear=linear)
    assert sorted(selection.targets) == linear
    assert set(selection.targets) <= set(targets)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_short_lists_are_those_of_peft(kind: str) -> None:
    for task in (None, "SEQ_CLS"):
        linear = _maybe_include_all_linear_layers(
            settings_of(target_modules="all-linear", task_type=task), model(kind)
        ).target_modules
        others = set(names(kind)) - linear
        assert set(_native.shortest_suffixes(sorted(linear), sorted(others))) == _find_minimal_target_modules(
            linear, others
        )


@st.composite
def keys(draw: st.DrawFn, kind: str) -> list[str]:
    plain = draw(entries(kind))
    edited = [
        draw(st.sampled_from(["{}", "^{}", "{}$", r".*\.{}", "({})"])).format(
            draw(st.sampled_from([key, re.escape(key)]))
        )
        for key in plain
    ]
    return list(dict.fromkeys(edited + draw(st.lists(expressions(kind), max_size=2))))


@given(st.data())
def test_keys_decide_as_they_do_in_peft(data: st.DataObject) -> None:
    kind = data.draw(kinds)
    chosen = data.draw(keys(kind))
    selection = _native.select(
        names(kind), target_modules=".*", patterns={"alpha_pattern": [], "rank_pattern": chosen}
    )
    found = selection.pattern_index("rank_pattern")
    assert selection.targets == names(kind)[1:]
    for name, index in zip(selection.targets, found, strict=True):
        assert get_pattern_key(chosen, name) == (chosen[index] if index >= 0 else name)
    unmatched = {
        entry for field, entry, count, _ in selection.report if field == "rank_pattern" and not count
    }
    assert unmatched == {
        key for key in chosen if not any(re.match(rf"(.*\.)?({key})$", name) for name in selection.targets)
    }
    assert selection.pattern_index("alpha_pattern") == [-1] * len(found)


@given(st.data())
def test_saved_modules_are_those_of_peft_but_for_names_that_only_end_alike(data: st.DataObject) -> None:
    kind = data.draw(kinds)
    saved = data.draw(entries(kind))
    # PEFT wraps whatever ends in an entry, `myhead` for `head` too.
    theirs = [name for name in names(kind) if any(name.endswith(entry) for entry in saved)]
    ours = _native.select(names(kind), modules_to_save=saved).modules_to_save
    assert ours == [name for name in theirs if any(f".{name}".endswith(f".{entry}") for entry in saved)]


@given(st.data())
def test_feedforward_modules_are_those_of_peft(data: st.DataObject) -> None:
    kind = data.draw(kinds)
    targets = data.draw(entries(kind, least=1))
    feedforward = data.draw(st.sampled_from([targets[:2], ["proj", "0"]]) | expressions(kind))
    selection = _native.select(names(kind), target_modules=targets, feedforward_modules=feedforward)
    config = SimpleNamespace(feedforward_modules=feedforward)
    assert selection.feedforward == [
        IA3Model._check_target_module_feedforward(config, name) for name in selection.targets
    ]


@pytest.mark.parametrize(
    "wanted",
    [
        ["gate_up_proj"],
        ["mlp.experts.down_proj", "gate.weight"],
        ["layers.1.mlp.experts.gate_up_proj"],
        ["proj"],
    ],
)
@pytest.mark.filterwarnings("ignore:target_parameters=")
def test_bare_parameters_are_those_of_peft(wanted: list[str]) -> None:
    with torch.device("meta"):
        base = MODELS["mixtral"]()
    parameters = [name for name, _ in base.named_parameters(remove_duplicate=False)]
    config = peft.LoraConfig(target_modules=[], target_parameters=wanted)
    ours = _native.select([], parameters=parameters, target_parameters=wanted).parameters
    theirs: list[str] = []
    # PEFT refuses to select nothing: "proj" always, and the experts' where transformers (4.51) still keeps a
    # module for each.
    if not ours:
        with pytest.raises(ValueError, match="also no `target_parameters` found"):
            peft.LoraModel(base, config, "default", low_cpu_mem_usage=True)
    else:
        theirs = peft.LoraModel(base, config, "default", low_cpu_mem_usage=True).targeted_parameter_names
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (
            "llama",
            {
                "target_modules": ["q_proj", "v_proj"],
                "layers_to_transform": [1, 3],
                "exclude_modules": ["layers.3.self_attn.v_proj"],
            },
        ),
        ("gpt2", {"target_modules": r".*\.h\.\d\.attn\.c_attn", "fan_in_fan_out": True}),
        ("t5", {"target_modules": "all-linear", "modules_to_save": ["final_layer_norm"]}),
    ],
)
def test_a_whole_injection_of_peft_adapts_the_same_modules(kind: str, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        base = MODELS[kind]()
    linear = _maybe_include_all_linear_layers(settings_of(target_modules="all-linear"), base).target_modules
    selection = select(
        kind,
        settings_of(**{key: value for key, value in config.items() if "modules" in key or "layers" in key}),
        linear=sorted(linear),
    )
    theirs = peft.LoraModel(
        base, peft.LoraConfig(**config), "default", low_cpu_mem_usage=True
    ).targeted_module_names
    assert selection.targets == theirs
