"""Weights that modules share: a merge changes what the adapters changed and nothing else, and unmerging
shares them again.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from peftrs.config import TargetedConfig
from peftrs.core import manage
from peftrs.core.tree import adapted_layers
from peftrs.errors import MergeError, PeftrsWarning
from peftrs.methods.lora import LoraConfig
from peftrs.methods.oft import OFTConfig
from tests.laws.cases import TOLERANCE, add, bits, distance, dtypes, same, seeds, stir


class Tied(nn.Module):
    """An output layer that shares the embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))

    def shares(self) -> bool:
        return inner(self.head).weight is inner(self.embedding).weight


class Replicated(nn.Module):
    """Two layers of a stack over one weight and one bias, as `layer_replication` makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = copy.copy(self.first)
        self.second._parameters = dict(self.first._parameters)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(
            torch.tanh(self.first(nn.functional.one_hot(tokens, 6).to(inner(self.first).weight.dtype)))
        )

    def shares(self) -> bool:
        one, other = inner(self.first), inner(self.second)
        return one.weight is other.weight and one.bias is other.bias


def inner(module: nn.Module) -> nn.Module:
    return getattr(module, "base_layer", module)


def lora(*targets: str, **options: object) -> TargetedConfig:
    return LoraConfig(target_modules=list(targets), r=2, init_lora_weights=False, **options)


def oft(*targets: str) -> TargetedConfig:
    return OFTConfig(target_modules=list(targets), oft_block_size=2, init_weights=False)


SHARING = {
    "the output layer alone": (Tied, [lora("head")]),
    "the embedding alone": (Tied, [lora("embedding")]),
    "both, apart": (Tied, [lora("embedding", "head")]),
    "both, of different methods": (Tied, [lora("embedding"), oft("head")]),
    "both, rotated": (Tied, [oft("embedding", "head")]),
    "both replicas": (Replicated, [lora("first", "second")]),
    "one replica": (Replicated, [lora("second")]),
    "both replicas and their bias": (Replicated, [lora("first", "second", lora_bias=True)]),
}


@pytest.mark.filterwarnings("ignore:.*share.*are copied:peftrs.errors.PeftrsWarning")
@pytest.mark.parametrize("sharing", SHARING.values(), ids=SHARING)
@settings(max_examples=4)
@given(dtype=dtypes, seed=seeds)
def test_merging_shared_weights_changes_no_output(
    sharing: tuple[type[nn.Module], list[TargetedConfig]], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    make, configs = sharing
    model = make().to(dtype).eval()
    tokens = torch.randint(0, 6, (2, 5))
    before, bare = bits(model), model(tokens)
    for name, config in zip("ab", configs, strict=False):
        add(model, config, name)
    manage.set_adapter(model, list("ab"[: len(configs)]))
    stir(model)
    unmerged = model(tokens)
    assert distance(unmerged, bare) > 2 * TOLERANCE[dtype]
    shared = model.shares()
    manage.merge(model)
    assert distance(model(tokens), unmerged) < 2 * TOLERANCE[dtype]
    manage.unmerge(list(adapted_layers(model)))
    assert model.shares() is shared
    assert same(bits(model), before)
    assert torch.equal(model(tokens), unmerged)


@pytest.mark.filterwarnings("ignore:.*share.*are copied:peftrs.errors.PeftrsWarning")
@pytest.mark.parametrize("sharing", SHARING.values(), ids=SHARING)
@pytest.mark.parametrize("goal", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_what_was_merged_and_moved_is_what_unmerged_would_have_moved_to(
    sharing: tuple[type[nn.Module], list[TargetedConfig]], goal: torch.dtype | str
) -> None:
    torch.manual_seed(0)
    make, configs = sharing
    model = make().eval()
    expected = copy.deepcopy(model).to(goal)
    for name, config in zip("ab", configs, strict=False):
        add(model, config, name)
    manage.set_adapter(model, list("ab"[: len(configs)]))
    stir(model)
    shared = model.shares()
    manage.merge(model)
    model.to(goal)
    manage.unmerge(list(adapted_layers(model)))
    assert model.shares() is shared or goal == "meta"  # where torch itself lets go of what is shared
    layers = {"embedding", "head"} if make is Tied else {"first", "second"}
    for name in layers:
        found, right = inner(getattr(model, name)), getattr(expected, name)
        for one, other in zip(found.parameters(), right.parameters(), strict=True):
            assert (one.dtype, one.device) == (other.dtype, other.device)
            assert goal == "meta" or torch.equal(one, other), name


def test_the_bytes_of_copied_weights_are_told() -> None:
    model = Tied()
    add(model, lora("head"), "a")
    with pytest.warns(PeftrsWarning, match=r"1 tensors that other modules share .* 288 bytes"):
        manage.merge(model)


@pytest.mark.filterwarnings("ignore:.*share.*are copied:peftrs.errors.PeftrsWarning")
@settings(max_examples=10)
@given(dtype=dtypes, seed=seeds)
def test_with_ensure_weight_tying_a_merge_keeps_both_layers_equal(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    model = Tied().to(dtype).eval()
    tokens = torch.randint(0, 6, (2, 5))
    add(model, lora("embedding", ensure_weight_tying=True), "a")
    stir(model)
    unmerged = model(tokens)
    manage.merge(model)
    assert distance(model(tokens), unmerged) < 2 * TOLERANCE[dtype]
    assert torch.equal(inner(model.head).weight, inner(model.embedding).weight)


def test_a_layer_in_two_places_is_adapted_in_both() -> None:
    layer = nn.Linear(6, 6)
    model = nn.ModuleDict({"first": layer, "second": layer})
    add(model, lora("first"), "a")
    stir(model)
    assert model["first"] is model["second"] is not layer
    x = torch.randn(3, 6)
    changed = model["second"](x)
    assert not torch.equal(changed, layer(x))
    manage.merge(model)
    assert distance(model["second"](x), changed) < TOLERANCE[torch.float32]
    assert manage.unload(model, merged=False)["first"] is model["second"] is layer


def test_a_layer_in_two_places_is_not_merged_into_the_one_that_is_not_adapted() -> None:
    layer = nn.Linear(6, 6)
    model = nn.ModuleDict({"first": layer})
    before = bits(model)
    add(model, lora("first"), "a")
    model["second"] = layer
    with pytest.raises(MergeError, match=r"^first: .* hangs in another place"):
        manage.merge(model)
    del model["second"]
    assert same(bits(model), before)
