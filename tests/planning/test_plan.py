"""A plan is told before anything is touched, and is what injection then does."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import peftrs
from peftrs import ConfigError, LoraConfig, NoMatchingPeftModuleError, PeftrsWarning, TargetError
from peftrs.core.tree import adapted_layers
from tests.model.tiny import bert, fingerprint, llama


class Hybrid(nn.Module):
    """Layers of which every few have attention, as in models that mix it with state spaces."""

    def __init__(self, count: int = 56, every: int = 14) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for number in range(count):
            layer = nn.Module()
            layer.mixer = nn.Linear(4, 4)
            if number % every == 3:
                layer.q_proj, layer.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)
            self.layers.append(layer)


CONFIGS: dict[str, tuple[Any, Any]] = {
    "defaults": (llama, LoraConfig()),
    "all-linear": (llama, LoraConfig(target_modules="all-linear", rank_pattern={"q_proj": 2})),
    "pattern": (
        llama,
        LoraConfig(target_modules=r".*\.1\..*_proj", exclude_modules=["o_proj"], use_dora=True),
    ),
    "classifier": (
        bert,
        LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler"]),
    ),
    "layers": (llama, LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])),
    "parameters": (llama, LoraConfig(target_modules=[], target_parameters=["mlp.up_proj.weight"])),
    "tied tokens": (
        lambda: llama(tied=True),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    ),
    "tied layers": (
        lambda: llama(tied=True),
        LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True),
    ),
    "ia3": (llama, peftrs.IA3Config()),
    "oft": (llama, peftrs.OFTConfig(oft_block_size=4)),
    "tokens": (lambda: llama(tied=True), peftrs.TrainableTokensConfig(token_indices=[3, 4])),
    "adaption prompt": (llama, peftrs.AdaptionPromptConfig(adapter_len=3, adapter_layers=1)),
    "prompt": (llama, peftrs.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "network": (
        llama,
        peftrs.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    ),
    "prefix": (llama, peftrs.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_plan_is_what_injection_does(case: str) -> None:
    make, config = CONFIGS[case]
    config, model = copy.deepcopy(config), make()
    before, stated = fingerprint(model), copy.deepcopy(config)
    plan = peftrs.plan(model, config)
    assert fingerprint(model) == before
    assert config == stated
    assert "peft_config" not in model.__dict__
    assert not plan.unmatched
    assert not plan.warnings
    adapted = peftrs.get_peft_model(model, config)
    inner = adapted.get_base_model()
    assert sorted(plan.targets) == sorted(layer.spec.name for layer in adapted_layers(inner))
    saved = {name for name, one in inner.named_modules() if hasattr(one, "modules_to_save")}
    assert set(plan.modules_to_save) == {name for name in saved if "modules_to_save" not in name}
    assert plan.trainable_parameters == adapted.get_nb_trainable_parameters()[0]
    assert peftrs.plan(adapted, stated).targets == plan.targets


def test_every_entry_is_told() -> None:
    config = LoraConfig(
        target_modules=["q_proj", "TYPO", "k_proj"], exclude_modules=[r"layers.1.self_attn.k_proj"]
    )
    plan = peftrs.plan(llama(), config)
    assert {(one.field, one.entry): one.matches for one in plan.entries if one.field == "target_modules"} == {
        ("target_modules", "TYPO"): 0,
        ("target_modules", "k_proj"): 2,
        ("target_modules", "q_proj"): 2,
    }
    assert [one.entry for one in plan.unmatched] == ["TYPO"]
    assert len(plan.targets) == 3
    assert plan.excluded == ["model.layers.1.self_attn.k_proj"]
    assert [(one.name, one.layers) for one in plan.coverage] == [("model.layers", {0: 2, 1: 1})]
    assert "TYPO" in plan.warnings[0]
    assert "target_modules: 'TYPO' matches 0" in str(plan)
    with pytest.raises(TargetError, match="'TYPO'"):
        peftrs.get_peft_model(llama(), config)


def test_a_near_name_is_given() -> None:
    near = peftrs.plan(llama(), LoraConfig(target_modules=["q_proj", "v_porj"])).unmatched[0].nearest
    assert near is not None
    assert near.endswith("v_proj")


def test_few_layers_of_many_are_warned_of() -> None:
    config = LoraConfig(target_modules=["q_proj", "v_proj"])
    plan = peftrs.plan(Hybrid(), config)
    assert plan.warnings == [
        "4 of 56 layers adapted in layers: the others have no module that the config names"
    ]
    assert [count for count in plan.coverage[0].layers.values() if count] == [2, 2, 2, 2]
    with pytest.warns(PeftrsWarning, match=r"4 of 56 layers adapted.*peftrs.plan"):
        peftrs.get_peft_model(Hybrid(), config)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["mixer", "q_proj"]),
        LoraConfig(target_modules=["layers.3.q_proj", "layers.17.q_proj"]),
        LoraConfig(target_modules=["mixer"], layers_to_transform=[0]),
        LoraConfig(target_modules=r"layers\.\d+\.q_proj"),
        LoraConfig(target_modules="all-linear"),
        LoraConfig(target_modules=["q_proj"], inference_mode=True),
    ],
    ids=lambda config: (
        config.target_modules
        if isinstance(config.target_modules, str)
        else "-".join(sorted(config.target_modules))
    ),
)
def test_who_means_some_layers_is_not_warned(config: LoraConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not peftrs.plan(Hybrid(), config).warnings
        peftrs.get_peft_model(Hybrid(), config)


def test_what_cannot_be_is_refused_as_injection_refuses_it() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match="nothing"):
        peftrs.plan(llama(), LoraConfig(target_modules=["nothing"]))
    with pytest.raises(ConfigError, match="not supported"):
        peftrs.plan(llama(), LoraConfig(target_modules=["rotary_emb"]))
    with pytest.raises(ConfigError, match="layer_replication"):
        peftrs.plan(llama(), LoraConfig(layer_replication=[[0, 2]]))
    with pytest.raises(ConfigError, match="does not say what kind"):
        peftrs.plan(llama(), peftrs.PeftConfig())


def test_a_plan_needs_no_values() -> None:
    with torch.device("meta"):
        model = llama(layers=12)
    assert len(peftrs.plan(model, LoraConfig(target_modules="all-linear")).targets) == 12 * 7
