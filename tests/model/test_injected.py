"""Adapters in models that other libraries manage, and what a config's targets become on a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

import peftrs
from peftrs import AdapterError, ConfigError, IA3Config, LoraConfig, PeftrsWarning
from peftrs.compat import functional
from peftrs.core.tree import adapted_layers
from peftrs.registry import MODULES
from tests.model.tiny import bert, llama, logits, stack


def adapted(model: Any) -> set[str]:
    return {layer.spec.name for layer in adapted_layers(model)}


def test_a_state_dict_says_which_layers() -> None:
    source = peftrs.get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]))
    for state in (source.state_dict(), peftrs.get_peft_model_state_dict(source)):
        model = llama()
        config = LoraConfig(target_modules=["k_proj"])
        assert peftrs.inject_adapter_in_model(config, model, state_dict=state) is model
        assert adapted(model) == {"model.layers.1.self_attn.q_proj"}
    config = LoraConfig(target_modules=[], target_parameters=["mlp.w"])
    with pytest.raises(ConfigError, match="target_parameters"):
        peftrs.inject_adapter_in_model(config, llama(), state_dict=source.state_dict())


def test_an_empty_adapter_waits_for_its_values() -> None:
    first, second = llama(), llama()
    peftrs.inject_adapter_in_model(LoraConfig(init_lora_weights=False), first, "x")
    peftrs.inject_adapter_in_model(LoraConfig(), second, "x", low_cpu_mem_usage=True)
    assert {parameter.device.type for name, parameter in second.named_parameters() if "lora_" in name} == {
        "meta"
    }
    state = peftrs.get_peft_model_state_dict(first, adapter_name="x")
    peftrs.set_peft_model_state_dict(second, state, "x", low_cpu_mem_usage=True)
    assert torch.equal(logits(first), logits(second))
    assert all(parameter.requires_grad for name, parameter in second.named_parameters() if "lora_" in name)


def test_functions_on_bare_models() -> None:
    model = stack()
    for name in ("x", "y"):
        peftrs.inject_adapter_in_model(LoraConfig(target_modules=["0"]), model, name)
    assert list(model.peft_config) == ["x", "y"]
    # The last one acts and is trained.
    assert model.layers[0].active_adapters == ["y"]
    held = {name: parameter.requires_grad for name, parameter in model.named_parameters() if "lora_A" in name}
    assert held == {"layers.0.lora_A.x.weight": False, "layers.0.lora_A.y.weight": True}
    functional.set_adapter(model, ["x", "y"])
    functional.set_requires_grad(model, "x", False)
    held = {name: parameter.requires_grad for name, parameter in model.named_parameters() if "lora_A" in name}
    assert held == {"layers.0.lora_A.x.weight": False, "layers.0.lora_A.y.weight": True}
    assert functional.delete_adapter(model, "x") == ["y"]
    assert functional.delete_adapter(model, "y", prefix="lora_") is None


def test_narrow_adapters_are_widened() -> None:
    model = stack().to(torch.bfloat16)
    peftrs.inject_adapter_in_model(LoraConfig(target_modules=["0"]), model)
    model.to(torch.bfloat16)
    functional.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
    assert model.layers[0].lora_A["default"].weight.dtype == torch.bfloat16
    functional.cast_adapter_dtype(model, "default")
    assert model.layers[0].lora_A["default"].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("base", "autocast", "expected"), [("bfloat16", True, "float32"), ("bfloat16", False, "bfloat16")]
)
def test_loaded_adapters_have_the_dtype_of_fresh_ones(
    tmp_path: Any, base: str, autocast: bool, expected: str
) -> None:
    peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    model = stack().to(getattr(torch, base))
    loaded = peftrs.PeftModel.from_pretrained(model, tmp_path, autocast_adapter_dtype=autocast)
    assert loaded.get_base_model().layers[0].lora_A["default"].weight.dtype == getattr(torch, expected)


def test_targets_follow_the_kind_of_model() -> None:
    config = LoraConfig()
    model = peftrs.get_peft_model(llama(), config)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert len(adapted(model)) == 4
    scaling = IA3Config()
    peftrs.get_peft_model(bert(), scaling)
    assert (scaling.target_modules, scaling.feedforward_modules) == (
        {"key", "value", "output.dense"},
        {"output.dense"},
    )


def test_all_linear_leaves_out_the_output_layer() -> None:
    config = LoraConfig(target_modules="all-linear")
    model = peftrs.get_peft_model(llama(layers=4), config)
    assert len(adapted(model)) == 28
    assert "lm_head" not in adapted(model)
    assert config.target_modules == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    few = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    assert "classifier" not in adapted(peftrs.get_peft_model(bert(), few))
    everything = peftrs.get_peft_model(stack(), LoraConfig(target_modules="all-linear"))
    assert adapted(everything) == {"layers.0", "layers.1", "head"}


def test_long_lists_are_shortened_to_the_same_layers() -> None:
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(12) for part in "qv"]
    config = LoraConfig(target_modules=names)
    assert adapted(peftrs.get_peft_model(llama(layers=12), config)) == set(names)
    assert config.target_modules == {"q_proj", "v_proj"}


def test_the_orientation_is_the_layers_own() -> None:
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
    )
    config = LoraConfig()
    with pytest.warns(PeftrsWarning, match=r"the target module is `Conv1D`\. Setting fan_in_fan_out to True"):
        peftrs.get_peft_model(gpt2, config)
    assert config.fan_in_fan_out is True
    config = LoraConfig(target_modules=["0"], fan_in_fan_out=True)
    with pytest.warns(PeftrsWarning, match=r"`torch\.nn\.Linear`\. Setting fan_in_fan_out to False"):
        peftrs.get_peft_model(stack(), config)


def test_layers_that_kernels_read_past_are_refused() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ConfigError, match="out_proj is incompatible with Mamba-based models"):
        peftrs.get_peft_model(mamba, LoraConfig(target_modules=["out_proj", "x_proj"]))


class TestReplication:
    def config(self, *ranges: tuple[int, int]) -> LoraConfig:
        return LoraConfig(
            target_modules=["q_proj"],
            layer_replication=[list(pair) for pair in ranges],
            init_lora_weights=False,
        )  # type: ignore[misc]

    def test_layers_repeat_with_adapters_of_their_own(self) -> None:
        base = llama()
        model = peftrs.get_peft_model(base, self.config((0, 2), (0, 2)))
        layers = base.model.layers
        assert len(layers) == base.config.num_hidden_layers == 4
        assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
        weights = [layer.self_attn.q_proj.base_layer.weight for layer in layers]
        assert weights[0] is weights[2]
        assert weights[1] is weights[3]
        assert not torch.equal(
            layers[0].self_attn.q_proj.lora_A["default"].weight,
            layers[2].self_attn.q_proj.lora_A["default"].weight,
        )
        assert (
            model.generate(
                input_ids=torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, pad_token_id=0
            ).shape[0]
            == 1
        )

    def test_a_grown_model_is_saved_and_loaded(self, tmp_path: Any) -> None:
        model = peftrs.get_peft_model(llama(), self.config((0, 2), (1, 2)))
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(peftrs.PeftModel.from_pretrained(llama(), tmp_path)), logits(model))

    def test_bert_grows_too(self) -> None:
        base = bert()
        peftrs.get_peft_model(base, LoraConfig(layer_replication=[[0, 1], [0, 2]]))  # type: ignore[list-item]
        assert len(base.bert.encoder.layer) == 3

    @pytest.mark.parametrize("ranges", [[(0, 3)], [(1, 1)], [(-1, 1)]])
    def test_ranges_lie_within_the_model(self, ranges: list[tuple[int, int]]) -> None:
        base = llama()
        with pytest.raises(ConfigError, match="layer_replication"):
            peftrs.get_peft_model(base, self.config(*ranges))
        assert len(base.model.layers) == base.config.num_hidden_layers == 2

    def test_a_failure_shrinks_the_model_again(self) -> None:
        base = llama()
        with pytest.raises(peftrs.TargetError):
            peftrs.get_peft_model(
                base, LoraConfig(target_modules=["nope"], layer_replication=[[0, 2], [0, 2]])
            )  # type: ignore[list-item]
        assert len(base.model.layers) == base.config.num_hidden_layers == 2

    def test_other_models_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="not on Linear"):
            peftrs.get_peft_model(
                torch.nn.Linear(2, 2), LoraConfig(target_modules=["x"], layer_replication=[[0, 1]])
            )  # type: ignore[list-item]


def test_an_adapter_needs_a_config_of_a_kind() -> None:
    with pytest.raises(ConfigError, match="does not say what kind"):
        peftrs.get_peft_model(stack(), peftrs.PeftConfig())
    with pytest.raises(AdapterError, match="must be one path component"):
        peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"]), "a.b")
    assert peftrs.get_peft_config({"peft_type": "LORA", "r": 3}) == LoraConfig(r=3)
    assert peftrs.PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig
    assert dict(peftrs.PEFT_TYPE_TO_CONFIG_MAPPING).keys() == set(MODULES)
