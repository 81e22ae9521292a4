"""Models with adapters are plain torch models: they copy, pickle and save after training, and name their
tensors once.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from peftrs.core import manage
from peftrs.core.tree import adapted_layers
from peftrs.errors import PeftrsWarning
from tests.laws.cases import CASES, KINDS, adapted, fitted, ids

cases = pytest.mark.parametrize("case", CASES, ids=ids)


def step(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """One step of training, gradients left in place."""
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    model(*inputs).square().mean().backward()
    optimizer.step()
    model.eval()


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@cases
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_after_a_training_step_is_the_same_model_and_another_one(case, copied) -> None:
    way, kind = case
    model = adapted([way, way], kind)
    inputs = KINDS[kind].inputs(torch.float32)
    before = model(*inputs)
    step(model, inputs)
    expected = model(*inputs)
    assert not torch.equal(expected, before)
    other = copied(model)
    assert torch.equal(other(*inputs), expected)
    assert other.state_dict().keys() == model.state_dict().keys()
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    manage.set_adapter(other, "b")
    changed = other(*inputs)
    assert not torch.equal(changed, expected)
    step(other, inputs)
    assert torch.equal(model(*inputs), expected)
    assert {layer.activation.active for layer in adapted_layers(model)} == {("a",)}
    manage.set_adapter(model, "b")
    assert torch.equal(model(*inputs), changed)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_of_a_merged_model_is_unmerged_when_other_adapters_are_to_act(copied) -> None:
    model = adapted(["lora", "lora"], "linear")
    inputs = KINDS["linear"].inputs(torch.float32)
    manage.set_adapter(model, "b")
    expected = model(*inputs)
    manage.set_adapter(model, "a")
    manage.merge(model)
    other = copied(model)
    assert torch.equal(other(*inputs), model(*inputs))
    with pytest.warns(PeftrsWarning, match="were merged and are unmerged now"):
        manage.set_adapter(other, "b")
    assert torch.equal(other(*inputs), expected)
    assert all(layer.merged_adapters == ["a"] for layer in adapted_layers(model))


@cases
def test_parameters_have_the_names_that_the_state_dict_has(case: tuple[str, str]) -> None:
    way, kind = case
    model = adapted([way, way], kind)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == model.state_dict().keys()
    layers = {id(layer.__dict__.get("frozen")): name for name, layer in model.named_modules()}
    for adapter in fitted(model):
        for slot, parameter in adapter.parameters():
            assert parameters[f"{layers[id(adapter.frozen)]}.{adapter.full_name(slot)}"] is parameter


@cases
def test_a_step_trains_every_tensor_of_the_active_adapter_and_nothing_else(case: tuple[str, str]) -> None:
    way, kind = case
    model = adapted([way, way], kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {
        id(tensor)
        for adapter in fitted(model)
        if adapter.name == "a"
        for _, tensor in adapter.parameters()
        if tensor.numel()
    }
    step(model, KINDS[kind].inputs(torch.float32))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is (id(parameter) not in trained), name


@cases
def test_a_state_dict_loads_into_another_model_with_the_same_adapters(case: tuple[str, str]) -> None:
    way, kind = case
    model, other = adapted([way], kind), adapted([way], kind)
    inputs = KINDS[kind].inputs(torch.float32)
    assert not torch.equal(other(*inputs), model(*inputs))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*inputs), model(*inputs))
