"""What code written for PEFT reads off models and layers, and sets on them."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftrs
from peftrs import AdapterError, IA3Config, LoraConfig, PeftModel, PeftrsWarning, PromptTuningConfig
from peftrs.compat.layers import AuxiliaryTrainingWrapper, TrainableTokensWrapper, layer_class
from tests.model.tiny import llama, shake, stack


class Mixed(nn.Module):
    """Layers of which none but the linear one says `in_features`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.turn = nn.Conv2d(4, 6, 3, groups=2)
        self.head = nn.Linear(6, 2)

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.table(tokens).permute(0, 3, 1, 2)
        return self.head(self.turn(x).mean((2, 3)))


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def test_names_of_what_adapters_change() -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["1"], modules_to_save=["head"]))
    model.add_adapter("other", LoraConfig(target_modules=[], target_parameters=["0.weight"]))
    assert model.targeted_module_names == ["layers.1"]
    assert model.base_model.targeted_parameter_names == ["layers.0.weight"]
    rows = peftrs.get_peft_model(llama(), LoraConfig(target_modules=["lm_head"], trainable_token_indices=[3]))
    assert rows.targeted_module_names == ["lm_head"]


def test_sizes_and_biases_of_layers_and_factors() -> None:
    model = peftrs.get_peft_model(
        mixed(), LoraConfig(r=2, target_modules=["table", "turn", "head"], use_dora=True)
    )
    base = model.get_base_model()
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in base.named_children()}
    assert sizes == {"table": (9, 4), "turn": (4, 6), "head": (6, 2)}
    down, up = base.head.lora_A["default"], base.head.lora_B["default"]
    assert (down.in_features, down.out_features, up.in_features, up.out_features) == (6, 2, 2, 2)
    assert down.bias is None
    assert up.bias is None
    assert "bias" not in dict(down.named_parameters())
    assert not hasattr(down, "stride")
    for twin in (copy.deepcopy(down), pickle.loads(pickle.dumps(down))):
        assert twin.out_features == 2
    assert not hasattr(base.table.lora_embedding_A, "in_features")


def test_strengths_can_be_put_in_place_of_all() -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    layer = model.get_base_model().layers[0]
    before, plain = layer.scaling.copy(), layer.get_delta_weight("default")
    layer.scaling = {name: value * 3 for name, value in layer.scaling.items()}
    assert before == {"default": 1.0}
    assert repr(layer.scaling) == "{'default': 3.0}"
    torch.testing.assert_close(layer.get_delta_weight("default"), 3 * plain)
    assert "scaling" not in layer.__dict__
    scaled = (
        peftrs.get_peft_model(stack(), IA3Config(target_modules=["0"], feedforward_modules=[]))
        .get_base_model()
        .layers[0]
    )
    assert not hasattr(scaled, "scaling")


def test_where_an_adapter_is_looked_for_once_it_is_deleted() -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"], modules_to_save=["head"]))
    model.add_adapter("gone", LoraConfig(target_modules=["0"], modules_to_save=["head"]))
    base = model.get_base_model()
    for holder in (base.layers[0], base.head):
        names = holder.adapter_layer_names + holder.other_param_names
        assert names
        assert any("gone" in getattr(holder, name) for name in names)
        for name in names:
            assert "default" in getattr(holder, name)
    model.delete_adapter("gone")
    for holder in (base.layers[0], base.head):
        assert not any(
            "gone" in getattr(holder, name) for name in holder.adapter_layer_names + holder.other_param_names
        )


def test_models_can_be_asked_for_whatever_they_may_lack() -> None:
    model = peftrs.get_peft_model(llama(), LoraConfig())
    assert not any(
        hasattr(model, name) for name in ("prompts", "prompt_tokens", "word_embeddings", "nothing")
    )
    with pytest.raises(AdapterError, match="no prompts"):
        _ = type(model).prompts.fget(model)
    prompted = peftrs.get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert hasattr(prompted, "word_embeddings")
    assert prompted.prompt_tokens["default"].tolist() == [0, 1]
    assert peftrs.LoraModel.uses_shared_state is False


def test_wrappers_are_told_apart() -> None:
    config = LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [3]}
    )
    model = peftrs.get_peft_model(llama(), config)
    base = model.get_base_model()
    table, head, query = base.model.embed_tokens, base.lm_head, base.model.layers[0].self_attn.q_proj
    kinds: Any = (AuxiliaryTrainingWrapper, TrainableTokensWrapper, layer_class("lora", "LoraLayer"))
    assert [[isinstance(module, kind) for kind in kinds] for module in (table, head, query)] == [
        [True, True, False], [True, False, False], [False, False, True],
    ]  # fmt: skip
    assert table.token_indices["default"] == [3]
    assert (
        table.token_adapter.trainable_tokens_delta["default"]
        is table.token_adapter["default"].trainable_tokens_delta
    )
    assert not hasattr(query.lora_A, "weight")
    state = model.state_dict()
    for name, module in (("embed_tokens", table), ("q_proj", query)):
        for inner in module.adapter_state_dict_load_map("default").values():
            assert any(key.endswith(f"{name}.{inner}") for key in state)
    assert table.adapter_state_dict_load_map("other") == {}


def test_a_name_that_is_taken() -> None:
    first = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0", "1"], init_lora_weights=False))
    with (
        pytest.warns(PeftrsWarning, match="has adapters already"),
        pytest.raises(AdapterError, match="already exists"),
    ):
        peftrs.get_peft_model(first, LoraConfig(target_modules=["0"]))
    assert first.targeted_module_names == ["layers.0", "layers.1"]
    peftrs.set_strict(False)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = peftrs.get_peft_model(first, LoraConfig(target_modules=["0"]))
    finally:
        peftrs.set_strict(True)
    assert any("already exists" in str(one.message) for one in caught)
    assert again.targeted_module_names == ["layers.0"]
    assert again.active_adapters == ["default"]
    x = torch.randn(3, 8)
    assert torch.equal(again(x), stack()(x))


def test_adapters_are_put_into_the_model_inside_and_into_compiled_ones() -> None:
    model = peftrs.get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    state = peftrs.get_peft_model_state_dict(model)
    assert peftrs.inject_adapter_in_model(LoraConfig(target_modules=["k_proj"]), model, "other") is model
    assert list(model.peft_config) == ["default", "other"]
    assert model.active_adapters == ["other"]
    compiled = torch.compile(llama())
    config = LoraConfig(target_modules=["v_proj"])
    assert peftrs.inject_adapter_in_model(config, compiled, state_dict=state) is compiled  # type: ignore[arg-type]
    assert list(compiled.peft_config) == ["default"]
    found = peftrs.get_peft_model_state_dict(compiled)  # type: ignore[arg-type]
    assert [f"base_model.model.{name}" for name in found] == list(state)
    with pytest.raises(peftrs.TargetError):
        peftrs.inject_adapter_in_model(
            LoraConfig(target_modules=["nothing"]), fresh := torch.compile(llama())
        )  # type: ignore[arg-type]
    assert not hasattr(fresh, "peft_config")


@pytest.mark.parametrize("trainable", [False, True])
def test_a_second_adapter_is_trained_if_it_is_loaded_for_that(trainable: bool, tmp_path: Path) -> None:
    source = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"], modules_to_save=["head"]))
    source.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(stack(), tmp_path, is_trainable=True)
    model.load_adapter(tmp_path, "other", is_trainable=trainable)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert {name for name in trained if ".default" in name}
    assert model.active_adapters == ["default"]
    assert bool({name for name in trained if ".other" in name}) is trainable


def test_dora_over_groups_is_peft_s(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "r": 4,
        "target_modules": ["turn"],
        "use_dora": True,
        "init_lora_weights": False,
    }
    x = torch.randint(0, 9, (2, 5, 5), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(mixed(), peft.LoraConfig(**options)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(mixed(), tmp_path)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.allclose(ours(x), mixed()(x))
    fresh = peftrs.get_peft_model(mixed(), LoraConfig(r=4, target_modules=["turn"], use_dora=True))
    torch.testing.assert_close(fresh(x), mixed()(x))


def test_an_empty_layers_pattern_is_none() -> None:
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="")
    assert peftrs.get_peft_model(llama(), config).targeted_module_names == ["model.layers.1.self_attn.q_proj"]


def test_a_config_says_its_version_from_the_start() -> None:
    assert LoraConfig().peft_version == peftrs.config.FORMAT_VERSION
    assert LoraConfig(peft_version="0.17.0").peft_version == "0.17.0"


def test_errors_are_of_the_builtin_classes_that_code_for_peft_catches(tmp_path: Path) -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"]))
    state = peftrs.get_base_model_state_dict(model)
    with pytest.raises(RuntimeError, match="1 unexpected"):
        peftrs.set_base_model_state_dict(model, state | {"more": torch.zeros(1)})
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="2 of another shape"):
        peftrs.PeftModel.from_pretrained(stack(), tmp_path, config=LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(TypeError, match="a ModuleList cannot be trained whole"):
        peftrs.get_peft_model(stack(), LoraConfig(target_modules=["head"], modules_to_save=["layers"]))
    (tmp_path / "adapter_config.json").write_text('{"foo": 1}')
    for kind in (peftrs.PeftConfig, LoraConfig):
        with pytest.raises(TypeError, match="has no `peft_type`"):
            kind.from_pretrained(tmp_path)


def test_names_of_tensors_that_wait_for_values(tmp_path: Path) -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"]), low_cpu_mem_usage=True)
    state = peftrs.get_peft_model_state_dict(model)
    assert {name.rpartition("0.")[2]: (tuple(one.shape), one.device.type) for name, one in state.items()} == {
        "lora_A.weight": ((8, 8), "meta"), "lora_B.weight": ((8, 8), "meta"),
    }  # fmt: skip
    with pytest.raises(AdapterError, match="has no values"):
        model.save_pretrained(tmp_path)


def test_a_module_trained_whole_names_the_adapters_that_act_on_it() -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"]))
    model.add_adapter("other", LoraConfig(target_modules=["0"], modules_to_save=["head"]))
    head = model.get_base_model().head
    assert head.active_adapters == []
    assert model.get_model_status().active_adapters == ["default"]
    model.set_adapter("other")
    assert head.active_adapters == ["other"]


def test_a_file_does_not_say_how_it_is_run(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text('{"peft_type": "LORA", "r": 4, "runtime_config": {"ephemeral_gpu_offload": true}}')
    assert LoraConfig.from_json_file(file) == {"peft_type": "LORA", "r": 4}
