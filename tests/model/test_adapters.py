"""Several adapters on one model: adding, choosing, turning off, deleting, merging."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import peftrs
from peftrs import AdapterError, ConfigError, IA3Config, LoraConfig, OFTConfig, PeftrsWarning, TargetError
from tests.model.tiny import bert, fingerprint, llama, logits, shake, stack

X = torch.ones(3, 8)


def two() -> Any:
    """A model with the adapters "a", which is active, and "b"."""
    model = peftrs.get_peft_model(
        stack(), LoraConfig(target_modules=["0", "1"], init_lora_weights=False), "a"
    )
    model.add_adapter("b", LoraConfig(target_modules=["1"], init_lora_weights=False))
    return model.eval()


def trained(model: Any) -> set[str]:
    return {
        name.rpartition("lora_")[2] for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def test_the_first_adapter_acts_and_is_trained_alone() -> None:
    model = two()
    assert model.active_adapter == "a"
    assert trained(model) == {"A.a.weight", "B.a.weight"}
    model.set_adapter("b")
    assert trained(model) == {"A.b.weight", "B.b.weight"}
    model.set_adapter("a", inference_mode=True)
    assert trained(model) == set()


def test_adapters_act_alone_and_together() -> None:
    model, outputs = two(), {}
    for names in ("a", "b", ["a", "b"]):
        model.set_adapter(names)
        outputs[str(names)] = model(X)
    with model.disable_adapter():
        base = model(X)
    assert torch.equal(base, stack()(X))
    assert len({output.detach().numpy().tobytes() for output in (*outputs.values(), base)}) == 4
    assert model.active_adapters == ["a", "b"]
    assert torch.equal(model(X), outputs["['a', 'b']"])


def test_another_adapter_changes_nothing_that_others_train() -> None:
    model = two()
    model.set_requires_grad("b")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.add_adapter("c", LoraConfig(target_modules=["0"], inference_mode=True))
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in after.keys() - before.keys())


def test_a_deleted_adapter_is_gone() -> None:
    model = two()
    with pytest.warns(PeftrsWarning, match="'a' was active and is deleted; 'b' is active now"):
        model.delete_adapter("a")
    assert list(model.peft_config) == model.active_adapters == ["b"]
    assert not [name for name in model.state_dict() if ".a." in name]
    with pytest.raises(AdapterError, match="Adapter a does not exist"):
        model.delete_adapter("a")
    model.delete_adapter("b")
    assert model.active_adapters == []
    assert torch.equal(model(X), stack()(X))
    model.add_adapter("c", LoraConfig(target_modules=["0"]))
    assert model.active_adapters == ["c"]


@pytest.mark.parametrize("names", ["zz", ["a", "zz"]])
def test_an_unknown_adapter_cannot_be_chosen(names: Any) -> None:
    model = two()
    with pytest.raises(AdapterError, match=r"Adapter zz not found.*\['a', 'b'\]"):
        model.set_adapter(names)
    assert model.active_adapters == ["a"]


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (LoraConfig(target_modules=["nope"]), TargetError, "not found in the base model"),
        (LoraConfig(target_modules=["0", "nope"]), TargetError, "nope"),
        (LoraConfig(), ConfigError, "Please specify `target_modules`"),
        (IA3Config(target_modules=["0"]), ConfigError, "Please specify `feedforward_modules`"),
        (
            LoraConfig(target_modules=["1"], layer_replication=[[0, 2]]),
            AdapterError,
            "for its first adapter only",
        ),
        (LoraConfig(target_modules=["0"], init_lora_weights="pissa", r=100), ConfigError, "rank 100"),
    ],
)
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(
    config: Any, error: type[Exception], words: str
) -> None:
    model = two()
    before, stated = fingerprint(model), copy.deepcopy(config)
    with pytest.raises(error, match=words):
        model.add_adapter("c", config)
    assert fingerprint(model) == before
    assert list(model.peft_config) == ["a", "b"]
    assert config == stated


def test_a_name_is_given_once() -> None:
    with pytest.raises(AdapterError, match=r"Adapter with name 'a' already exists\."):
        two().add_adapter("a", LoraConfig(target_modules=["0"]))


def test_one_adapter_alone_may_train_biases() -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"], bias="lora_only"))
    model.add_adapter("plain", LoraConfig(target_modules=["0"]))
    with pytest.raises(AdapterError, match="'default', 'more'"):
        model.add_adapter("more", LoraConfig(target_modules=["0"], bias="all"))
    with pytest.warns(PeftrsWarning, match="bias configured to be 'lora_only'"), model.disable_adapter():
        pass


def test_adapters_of_several_kinds_share_a_model() -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0", "1"]), mixed=True)
    assert isinstance(model, peftrs.PeftMixedModel)
    model.add_adapter("turn", OFTConfig(r=0, oft_block_size=4, target_modules=["0"]))
    model.add_adapter("scale", IA3Config(target_modules=["1"], feedforward_modules=[]))
    model.set_adapter(["default", "turn", "scale"])
    shake(model)
    expected = model.eval()(X)
    assert torch.allclose(model.merge_and_unload()(X), expected, atol=1e-5)


def test_merging_keeps_outputs_and_unmerging_every_bit() -> None:
    model = two()
    before, expected = fingerprint(model), model(X)
    model.merge_adapter()
    assert torch.allclose(model(X), expected, atol=1e-6)
    with pytest.raises(AdapterError, match="while it is merged"):
        model.delete_adapter("a")
    assert "a" in model.peft_config
    model.unmerge_adapter()
    assert fingerprint(model) == before
    with pytest.warns(PeftrsWarning, match="nothing is merged"):
        model.unmerge_adapter()
    with pytest.raises(TypeError, match="list of names"):
        model.merge_adapter("a")


@pytest.mark.parametrize("progressbar", [False, True])
def test_merge_and_unload_gives_back_the_users_model(
    progressbar: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    model = two()
    expected = model(X)
    base = model.merge_and_unload(progressbar=progressbar)
    assert type(base) is type(stack())
    assert base.state_dict().keys() == stack().state_dict().keys()
    assert not hasattr(base, "peft_config")
    assert torch.allclose(base(X), expected, atol=1e-6)
    assert ("Merging" in capfd.readouterr().err) is progressbar


def test_unload_leaves_the_base_as_it_was_but_for_what_was_trained_whole() -> None:
    model = two()
    assert torch.equal(model.unload()(X), stack()(X))
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["0"], modules_to_save=["head"]))
    shake(model)
    head = model.get_base_model().head.modules_to_save["default"].weight
    assert model.unload().head.weight is head


def test_untied_embeddings_are_said_to_be_so() -> None:
    model = peftrs.get_peft_model(
        llama(tied=True), LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
    )
    with pytest.warns(PeftrsWarning, match="share|tie"):
        base = model.merge_and_unload()
    assert base.config.tie_word_embeddings is False


def test_a_second_wrapping_warns() -> None:
    base = stack()
    peftrs.get_peft_model(base, LoraConfig(target_modules=["0"]))
    with pytest.warns(PeftrsWarning, match="has adapters already"):
        peftrs.get_peft_model(base, LoraConfig(target_modules=["0"]), "other")


def test_the_bases_name_is_written_into_the_config() -> None:
    base = llama()
    base.name_or_path = "org/base"
    config = LoraConfig(base_model_name_or_path="org/other", revision="old")
    with pytest.warns(PeftrsWarning) as told:
        peftrs.get_peft_model(base, config, revision="new")
    assert [str(each.message).partition(" is replaced")[0] for each in told] == [
        "the config's base model 'org/other'",
        "the config's revision 'old'",
    ]
    assert (config.base_model_name_or_path, config.revision) == ("org/base", "new")


def test_parameters_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    model = two()
    trained_count = 2 * 2 * 8 * 8
    base_count = sum(parameter.numel() for parameter in stack().parameters())
    assert model.get_nb_trainable_parameters() == (trained_count, base_count + trained_count + 2 * 8 * 8)
    model.print_trainable_parameters()
    total = base_count + trained_count + 128
    assert (
        capsys.readouterr().out == f"trainable params: {trained_count} || all params: {total} || trainable%:"
        f" {100 * trained_count / total:.4f}\n"
    )


def test_generation_and_checkpointing_work_through_the_wrapper() -> None:
    base = llama()
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable({"use_reentrant": True})
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = peftrs.get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    tokens = torch.ones(1, 4, dtype=torch.long)
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert model.eval().generate(
        input_ids=tokens, max_new_tokens=2, min_new_tokens=2, pad_token_id=0
    ).shape == (1, 6)


def test_a_model_is_copied_and_pickled_whole() -> None:
    model = two()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), model(X))
        other.set_adapter("b")
        assert model.active_adapters == ["a"]
        other.delete_adapter("a")
        assert "a" in model.peft_config


def test_a_task_class_trains_its_head() -> None:
    config = LoraConfig(task_type="SEQ_CLS")
    model = peftrs.get_peft_model(bert(), config)
    assert type(model) is peftrs.PeftModelForSequenceClassification
    assert config.modules_to_save == ["classifier", "score"]
    assert model.modules_to_save == {"classifier", "score"}
    model.add_adapter("more", LoraConfig(task_type="SEQ_CLS"))
    assert model.peft_config["more"].modules_to_save == ["classifier", "score"]
    before = logits(model)
    shake(model)
    assert not torch.equal(logits(model), before)
