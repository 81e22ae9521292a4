"""A mixed batch gives every row what its adapter alone gives it, whatever the method and the kind of
layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import cycle, islice

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftrs
from peftrs.core import manage
from peftrs.core.batch import NONE
from peftrs.errors import AdapterError
from tests.laws.cases import BARE, CASES, KINDS, TOLERANCE, WAYS_FOR, adapted, distance, ids
from tests.model.tiny import TOKENS, bert, llama, shake

UNITED = (*BARE, "attention")
"""Kinds whose weight is read as a whole."""
MIXED = [(way, kind) for way, kind in CASES if kind not in UNITED]


def rows_of(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat([KINDS[kind].inputs(dtype)[0] for _ in range(3)])


def one_by_one(model: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    """The output of every row for itself, with its adapter the only one that is active."""

    def single(name: str, row: Tensor) -> Tensor:
        if name == NONE:
            with manage.disabled(model):
                return model(row)
        manage.set_adapter(model, name)
        return model(row)

    return torch.cat(
        [single(name, row) for name, row in zip(names, x.split(len(x) // len(names)), strict=True)]
    )


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def names_for(x: Tensor) -> list[str]:
    return list(islice(cycle(["b", NONE, "a", "a"]), len(x)))


@pytest.mark.parametrize("case", MIXED, ids=ids)
def test_every_row_has_its_own_adapter(case: tuple[str, str]) -> None:
    way, kind = case
    other = WAYS_FOR[kind][WAYS_FOR[kind].index(way) - 1]
    for second in (way, other):
        model, x = adapted([way, second], kind), rows_of(kind)
        names = names_for(x)
        with torch.no_grad(), manage.mixed(model, names, len(x)):
            mixed = model(x)
        with torch.no_grad():
            assert distance(mixed, one_by_one(model, x, names)) < 2e-6


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_narrow_layers_keep_their_dtype(dtype: torch.dtype) -> None:
    model, x = adapted(["lora", "lora-rs"], "linear", dtype), rows_of("linear", dtype)
    names = names_for(x)
    with torch.no_grad(), manage.mixed(model, names):
        mixed = model(x)
    assert mixed.dtype == dtype
    with torch.no_grad():
        assert distance(mixed, one_by_one(model, x, names)) < TOLERANCE[dtype]


def test_the_frozen_layer_runs_once_for_all_rows() -> None:
    model, x = adapted(["lora", "lora-rs", "pissa"], "linear"), rows_of("linear")
    calls: list[int] = []
    model.get_submodule("layer.base_layer").register_forward_hook(
        lambda _, inputs, __: calls.append(len(inputs[0]))
    )
    with torch.no_grad(), manage.mixed(model, ["a", "b", "c", NONE, "b", "a"]):
        model(x)
    assert calls == [6]


def test_a_row_may_be_there_several_times() -> None:
    model, x = adapted(["lora", "oft"], "linear"), rows_of("linear")
    for flat in (x, x.flatten(0, 1)):
        with torch.no_grad(), manage.mixed(model, ["b", NONE, "a"]):
            mixed = model(flat)
        with torch.no_grad():
            assert distance(mixed, one_by_one(model, flat, ["b", NONE, "a"])) < 2e-6
    with (
        pytest.raises(AdapterError, match="its input has 6 rows, which are not those of 4"),
        manage.mixed(model, ["a"] * 4),
    ):
        model(x)


@pytest.mark.parametrize("kind", UNITED)
def test_weights_that_are_read_as_a_whole_are_refused(kind: str) -> None:
    model = adapted(["lora", "lora"], kind)
    with pytest.raises(AdapterError, match=r"layer.*read by another module"), manage.mixed(model, ["a", "b"]):
        pass
    inputs = KINDS[kind].inputs(torch.float32)
    with torch.no_grad(), manage.disabled(model):
        expected = first(model(*inputs))
    with torch.no_grad(), manage.mixed(model, [NONE]):
        assert torch.equal(first(model(*inputs)), expected)


# Whole models.


@pytest.fixture
def model() -> Iterator[peftrs.PeftModel]:
    """A decoder with adapters of different ranks, methods and layers."""
    config = peftrs.LoraConfig(
        target_modules=["q_proj", "down_proj", "embed_tokens"], r=2, task_type="CAUSAL_LM"
    )
    model = peftrs.get_peft_model(llama(), config, "small")
    model.add_adapter(
        "large", peftrs.LoraConfig(target_modules=["q_proj", "v_proj"], r=5, use_rslora=True, lora_bias=True)
    )
    model.add_adapter("turned", peftrs.OFTConfig(target_modules=["q_proj", "o_proj"], oft_block_size=4))
    for name in ("small", "large", "turned"):
        model.set_adapter(name)
        shake(model)
    return model.eval()


NAMES = ["small", NONE, "turned", "large"]
TEXTS = torch.cat([TOKENS, TOKENS.flip(1)])


def alone(model: peftrs.PeftModel, name: str, call: str, tokens: Tensor, **options: object) -> Tensor:
    def run() -> Tensor:
        output = getattr(model, call)(input_ids=tokens, **options)
        return output if isinstance(output, Tensor) else output.logits

    with torch.no_grad():
        if name == NONE:
            with model.disable_adapter():
                return run()
        model.set_adapter(name)
        return run()


def test_a_model_gives_every_row_what_its_adapter_gives(model: peftrs.PeftModel) -> None:
    with torch.no_grad():
        mixed = model(input_ids=TEXTS, adapter_names=NAMES).logits
    for place, name in enumerate(NAMES):
        expected = alone(model, name, "forward", TEXTS[place : place + 1])
        torch.testing.assert_close(mixed[place : place + 1], expected, rtol=1e-5, atol=1e-5)
    assert len({tuple(row.flatten().tolist()) for row in mixed}) == 4
    model.set_adapter("large")
    with torch.no_grad():
        assert torch.equal(model(input_ids=TEXTS, adapter_names=None).logits, model(input_ids=TEXTS).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_texts_are_generated_row_by_row(model: peftrs.PeftModel, options: dict[str, object]) -> None:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0} | options
    mixed = model.generate(
        input_ids=TEXTS, attention_mask=torch.ones_like(TEXTS), adapter_names=NAMES, **options
    )
    for place, name in enumerate(NAMES):
        tokens = TEXTS[place : place + 1]
        expected = alone(model, name, "generate", tokens, attention_mask=torch.ones_like(tokens), **options)
        assert torch.equal(mixed[place : place + 1], expected)


def test_an_encoder_and_its_decoder_tell_beams_apart() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 64,
        "decoder_start_token_id": 0,
    }
    model = peftrs.get_peft_model(
        T5ForConditionalGeneration(T5Config(**sizes)), peftrs.LoraConfig(target_modules=["q", "v"]), "a"
    )
    model.add_adapter("b", peftrs.LoraConfig(target_modules=["q", "wi"], r=3))
    for name in "ab":
        model.set_adapter(name)
        shake(model)
    model.eval()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    mixed = model.generate(input_ids=TEXTS, adapter_names=["a", NONE, "b", "b"], **options)
    for place, name in enumerate(["a", NONE, "b", "b"]):
        assert torch.equal(
            mixed[place : place + 1], alone(model, name, "generate", TEXTS[place : place + 1], **options)
        )


def test_modules_trained_whole_go_with_their_rows() -> None:
    model = peftrs.get_peft_model(
        bert(), peftrs.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"), "a"
    )
    model.add_adapter(
        "b", peftrs.LoraConfig(target_modules=["value"], trainable_token_indices=[1, 5], task_type="SEQ_CLS")
    )
    for name in "ab":
        model.set_adapter(name)
        shake(model)
    model.eval()
    names = ["b", "a", NONE, "b"]
    with torch.no_grad():
        mixed = model(input_ids=TEXTS, adapter_names=names).logits
    for place, name in enumerate(names):
        expected = alone(model, name, "forward", TEXTS[place : place + 1])
        torch.testing.assert_close(mixed[place : place + 1], expected, rtol=1e-5, atol=1e-5)


class Headed(nn.Module):
    """A network that calls its head as it is told to."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.below, self.head, self.name = nn.Linear(8, 8), nn.Linear(8, 4), name

    def forward(self, x: Tensor) -> Tensor:
        x = self.below(x)
        return self.head(x) if self.name is None else self.head(**{self.name: x})


def headed(name: str | None = None) -> tuple[nn.Module, nn.Module]:
    """A network, and the same whose adapter `a`, the active one, replaces the head, and `b` does not."""
    base = Headed(name)
    model = peftrs.get_peft_model(
        copy.deepcopy(base), peftrs.LoraConfig(target_modules=["below"], modules_to_save=["head"]), "a"
    )
    model.add_adapter("b", peftrs.LoraConfig(target_modules=["below"], init_lora_weights=False))
    model.set_adapter("a")
    shake(model)
    return base, model.eval()


@pytest.mark.parametrize("names", [["b", NONE], [NONE, NONE], ["a", NONE]], ids=str)
def test_rows_run_the_head_of_their_own_adapter_and_not_the_active_one_s(names: list[str]) -> None:
    base, model = headed()
    x = torch.randn(2, 8)
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
        torch.testing.assert_close(mixed[1:], base(x[1:]))
        assert torch.allclose(mixed[:1], base(x[:1])) == (names[0] == NONE)
        if names[0] != NONE:
            model.set_adapter(names[0])
            torch.testing.assert_close(mixed[:1], model(x[:1]))


def test_a_replaced_module_is_called_by_keyword() -> None:
    _, model = headed("input")
    x = torch.randn(2, 8)
    with torch.no_grad():
        mixed = model(x, adapter_names=["a", "b"])
        for place, name in enumerate("ab"):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[place], model(x)[place])


def test_a_layer_of_gpt2_is_called_by_keyword() -> None:
    net = nn.Sequential()
    net.add_module("layer", Conv1D(4, 8))
    model = peftrs.get_peft_model(
        net, peftrs.LoraConfig(target_modules=["layer"], init_lora_weights=False, fan_in_fan_out=True)
    )
    x = torch.randn(2, 8)
    layer = model.eval().base_model.model.layer
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(layer(x=x), expected)
        with manage.mixed(model, ["default", NONE]):
            torch.testing.assert_close(layer(x=x)[0], expected[0])


def test_rows_without_adapters_are_those_of_the_base_when_all_are_off(model: peftrs.PeftModel) -> None:
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=TEXTS, adapter_names=NAMES).logits, model(input_ids=TEXTS).logits)


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (
            ["small", "none", NONE, "other"],
            r"non-existing adapter\(s\): 'none', 'other'. The model has \['small', ",
        ),
        (
            ["small", "large"],
            "Length of `adapter_names` should be the same as the number of inputs, but got 2 and 4",
        ),
        ("small", "has to be a list"),
        ([], "has to be a list"),
    ],
)
def test_names_that_do_not_fit_are_refused(model: peftrs.PeftModel, names: list[str], fault: str) -> None:
    for call in (model, model.generate):
        with pytest.raises(AdapterError, match=fault):
            call(input_ids=TEXTS, adapter_names=names)
    model(input_ids=TEXTS)


def test_what_has_no_rows_is_refused_and_leaves_the_model_as_it_was(model: peftrs.PeftModel) -> None:
    model.train()
    with pytest.raises(AdapterError, match="training mode"):
        model(input_ids=TEXTS, adapter_names=NAMES)
    model.eval().set_adapter("small")
    expected = model(input_ids=TEXTS).logits
    model.merge_adapter()
    with pytest.raises(AdapterError, match="when there are merged adapters"):
        model(input_ids=TEXTS, adapter_names=NAMES)
    model.unmerge_adapter()
    prompt = peftrs.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model.add_adapter("prompt", prompt)
    with pytest.raises(AdapterError, match="a prompt is for the whole batch"):
        model(input_ids=TEXTS, adapter_names=["prompt"] * 4)
    assert torch.equal(model(input_ids=TEXTS).logits, expected)


def test_experts_that_are_given_tokens_are_refused() -> None:
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})
    model = peftrs.inject_adapter_in_model(
        peftrs.LoraConfig(target_modules=["experts.0"]), experts, "a"
    ).eval()
    with pytest.raises(AdapterError, match=r"experts\.0: an expert"), manage.mixed(model, ["a"]):
        pass
