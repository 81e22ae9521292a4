"""What an adapter's file is called by depends on the adapter alone: not on which others are there, nor on
which came first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from itertools import chain, combinations, permutations
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftrs
from peftrs import AdapterError, LoraConfig
from peftrs.convert.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from tests.model.tiny import fingerprint, llama, logits, shake

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


class Stacks(nn.Module):
    """Three parameters of one shape, in an order that is not their names', and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 6, 6) / 2)
        self.gate = nn.Parameter(torch.randn(2, 6, 6) / 2)
        self.back = nn.Parameter(torch.randn(2, 6, 6) / 2)
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for weight in (self.gate, self.up, self.back):
            x = self.mix(torch.einsum("bi,eoi->bo", x, weight).tanh())
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stacks = Stacks()
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stacks(x))
        return x + self.mha(x, x, x, need_weights=False)[0]


PARAMETERS = ("stacks.up", "stacks.gate", "stacks.back")
CHOICES = list(chain.from_iterable(permutations(PARAMETERS, count) for count in (1, 2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def config(parameters: Sequence[str], modules: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    return {"r": 2, "target_modules": list(modules), "target_parameters": list(parameters), **options}


def add(model: Any, name: str, settings: dict[str, Any]) -> Any:
    """The model with one adapter more, which changes much."""
    asked = LoraConfig(**copy.deepcopy(settings))
    if model is None:
        model = peftrs.get_peft_model(net(), asked, adapter_name=name)
    else:
        model.add_adapter(name, asked)
    generator = torch.Generator().manual_seed(len(name) + 7 * ord(name[0]))
    with torch.no_grad():
        for tensor in peftrs.get_peft_model_state_dict(model, adapter_name=name).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    return model


def together(*every: dict[str, Any]) -> Any:
    model = None
    for name, asked in zip("abc", every, strict=False):
        model = add(model, name, asked)
    return model


def out(model: Any, adapter: str | None = None) -> Tensor:
    if adapter is not None:
        model.set_adapter(adapter)
    with torch.no_grad():
        return model.eval()(X)


@cache
def names_in_peft(parameters: tuple[str, ...], modules: tuple[str, ...] = ()) -> set[str]:
    return set(
        peft.get_peft_model_state_dict(
            peft.get_peft_model(net(), peft.LoraConfig(**config(parameters, modules)))
        )
    )


def assert_alone(model: Any, adapter: str, folder: Path) -> None:
    """The adapter, saved and loaded on a fresh base, is what it is here, and as named as PEFT has it."""
    asked = model.peft_config[adapter]
    names = set(peftrs.get_peft_model_state_dict(model, adapter_name=adapter))
    assert names == names_in_peft(tuple(asked.target_parameters), tuple(asked.target_modules))
    gathered = peftrs.get_peft_model_state_dict(model, model.state_dict(), adapter_name=adapter)
    assert set(gathered) == names
    model.save_pretrained(folder, selected_adapters=[adapter])
    loaded = peftrs.PeftModel.from_pretrained(net(), folder / adapter)
    assert torch.equal(out(loaded), out(model, adapter))


@pytest.mark.parametrize("first", CHOICES, ids="-".join)
def test_two_adapters_are_saved_as_what_each_is(first: tuple[str, ...], tmp_path: Path) -> None:
    for second in CHOICES:
        model = together(config(first), config(second))
        for adapter in "ab":
            assert_alone(model, adapter, tmp_path)


parameters = st.lists(st.sampled_from(PARAMETERS), min_size=1, unique=True)
modules = st.sampled_from([[], ["mix"], ["mix", "block.0"], ["mha"]])
steps = st.tuples(st.sampled_from("abc"), parameters, modules)


@settings(max_examples=60)
@given(history=st.lists(steps, min_size=2, max_size=6))
def test_adapters_that_come_and_go_are_saved_as_what_each_is(
    history: list[tuple[str, list[str], list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model: Any = None
    for name, chosen, layers in history:
        if model is not None and name in model.peft_config:
            if len(model.peft_config) > 1:
                model.set_adapter(next(one for one in model.peft_config if one != name))
                model.delete_adapter(name)
            else:
                continue
        model = add(model, name, config(chosen, layers))
    for name in model.peft_config:
        assert_alone(model, name, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("order", [*permutations(range(3))], ids=str)
def test_names_in_memory_do_not_tell_who_came_first(order: tuple[int, ...]) -> None:
    every = {
        "a": config(["stacks.back"]),
        "b": config(["stacks.gate", "stacks.up"], ["mix"]),
        "c": config(["stacks.up"]),
    }
    one: Any = None
    for name, asked in every.items():
        one = add(one, name, asked)
    other: Any = None
    for at in order:
        other = add(other, "abc"[at], every["abc"[at]])
    assert one.state_dict().keys() == other.state_dict().keys()
    shake(other)
    other.load_state_dict(one.state_dict())
    for name in every:
        assert torch.equal(out(other, name), out(one, name))
    members = one.base_model.model.stacks.activation.members
    assert len(members) == len(set(members)) == 4


@pytest.mark.parametrize("wanted", [*permutations(PARAMETERS)], ids="-".join)
@pytest.mark.parametrize("others", [*combinations(PARAMETERS, 1), *combinations(PARAMETERS, 2)], ids="-".join)
def test_files_of_peft_mean_the_same_beside_others(
    wanted: tuple[str, ...], others: tuple[str, ...], tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**config(wanted, ["mix"], init_lora_weights=False)))
    theirs.save_pretrained(tmp_path)
    ours = add(None, "a", config(others))
    ours.load_adapter(tmp_path, "b")
    torch.testing.assert_close(out(ours, "b"), out(theirs), rtol=0, atol=2e-6)
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["b"])
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours" / "b")
    torch.testing.assert_close(out(again), out(theirs), rtol=0, atol=2e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_wrappers_of_others_around_and_above_a_layer_leave_its_names(turned: bool, tmp_path: Path) -> None:
    pairs = {
        "a module and its parameter": (config([], ["block.0"]), config(["block.0.weight"])),
        "attention and its projection": (config([], ["mha"]), config([], ["mha.out_proj"])),
        "a layer in a module with parameters": (config([], ["stacks.mix"]), config(PARAMETERS)),
    }
    for about, pair in pairs.items():
        model = together(*(pair[::-1] if turned else pair))
        for adapter in "ab":
            asked = model.peft_config[adapter]
            names = names_in_peft(tuple(asked.target_parameters), tuple(sorted(asked.target_modules)))
            assert set(peftrs.get_peft_model_state_dict(model, adapter_name=adapter)) == names, about
            model.save_pretrained(tmp_path, selected_adapters=[adapter])
            loaded = peftrs.PeftModel.from_pretrained(net(), tmp_path / adapter)
            assert torch.equal(out(loaded), out(model, adapter)), about


def test_a_layer_in_a_module_that_another_adapter_trains_whole_keeps_its_name(tmp_path: Path) -> None:
    model = together(config(["stacks.up"], modules_to_save=["block"]), config([], ["block.0"]))
    assert set(peftrs.get_peft_model_state_dict(model, adapter_name="b")) == names_in_peft((), ("block.0",))
    model.save_pretrained(tmp_path)
    assert torch.equal(out(peftrs.PeftModel.from_pretrained(net(), tmp_path / "b")), out(model, "b"))


def test_biases_are_named_without_the_wrappers_of_others(tmp_path: Path) -> None:
    asked = config([], ["block.0"], bias="all")
    model, alone = together(asked, config(["stacks.up"], ["block.1"])), together(asked)
    keys = [peftrs.get_peft_model_state_dict(one, adapter_name="a").keys() for one in (model, alone)]
    assert keys[0] == keys[1]
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    assert torch.equal(out(peftrs.PeftModel.from_pretrained(net(), tmp_path / "a")), out(model, "a"))


@pytest.mark.parametrize("first", ["a", "b"])
def test_embeddings_are_named_without_the_wrappers_of_others(first: str, tmp_path: Path) -> None:
    every = {
        "a": LoraConfig(r=2, target_modules=["q_proj"]),
        "b": LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]),
    }
    model: Any = None
    for name in (first, "b" if first == "a" else "a"):
        if model is None:
            model = peftrs.get_peft_model(llama(), every[name], adapter_name=name)
        else:
            model.add_adapter(name, every[name])
    model.set_adapter("a")
    shake(model)
    model.save_pretrained(tmp_path, selected_adapters=["a"], save_embedding_layers=True)
    loaded = peftrs.PeftModel.from_pretrained(llama(), tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))


def test_swapping_finds_the_parameters_beside_other_adapters(tmp_path: Path) -> None:
    asked = config(["stacks.up", "stacks.back"])
    other = together(asked)
    other.save_pretrained(tmp_path)
    model = add(
        add(add(None, "x", config(["stacks.gate"])), "a", asked), "y", config(["stacks.back"], ["stacks.mix"])
    )
    before = {name: out(model, name) for name in "xy"}
    shaken = copy.deepcopy(model)
    shaken.set_adapter("a")
    shake(shaken)
    moved = {name: tensor.clone() for name, tensor in shaken.state_dict().items() if ".a." in name}
    hotswap_adapter_from_state_dict(model, moved, "a", LoraConfig(**asked))
    assert torch.equal(out(model, "a"), out(shaken, "a"))
    hotswap_adapter(model, str(tmp_path / "a"), "a")
    assert torch.equal(out(model, "a"), out(other))
    hotswap_adapter_from_state_dict(model, moved, "a", LoraConfig(**asked))
    alone = {name: tensor for name, tensor in other.state_dict().items() if ".a." in name}
    hotswap_adapter_from_state_dict(model, alone, "a", LoraConfig(**asked))
    assert torch.equal(out(model, "a"), out(other))
    for name, expected in before.items():
        assert torch.equal(out(model, name), expected)


def test_merging_and_unmerging_go_with_wrappers_that_came_beneath() -> None:
    model = together(config(["stacks.back"]), config(PARAMETERS))
    bits = fingerprint(model)
    for name in "ab":
        expected = out(model, name)
        model.merge_adapter()
        torch.testing.assert_close(out(model), expected, rtol=0, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(out(model), expected)
    model.set_adapter("a")
    assert {name: value[2] for name, value in fingerprint(model).items()} == {
        name: value[2] for name, value in bits.items()
    }


def test_a_wrapper_that_would_go_beneath_a_merged_one_is_refused_and_nothing_is_changed() -> None:
    model = together(config(["stacks.back"]))
    model.merge_adapter()
    before = fingerprint(model)
    with pytest.raises(
        AdapterError, match=r"'stacks\.up', 'stacks\.gate': cannot be adapted while 'a' is .*unmerge_adapter"
    ):
        model.add_adapter("b", LoraConfig(**config(PARAMETERS)))
    assert fingerprint(model) == before
    assert list(model.peft_config) == ["a"]
    model.unmerge_adapter()
    assert torch.equal(out(add(model, "b", config(PARAMETERS)), "a"), out(together(config(["stacks.back"]))))


def test_a_wrapper_beneath_another_is_taken_out_again_where_loading_fails(tmp_path: Path) -> None:
    both = together(config(["stacks.gate"], ["stacks.mix"]), config(PARAMETERS))
    both.save_pretrained(tmp_path)
    model = together(config(["stacks.gate"]))
    before, members = fingerprint(model), list(model.base_model.model.stacks.activation.members)
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(
        (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(peftrs.CheckpointError):
        model.load_adapter(tmp_path / "b", "b")
    assert fingerprint(model) == before
    assert model.base_model.model.stacks.activation.members == members
