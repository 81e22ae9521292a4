"""Merging changes no output, and unmerging restores every bit, whatever happened in between."""

import copy
import io
import pickle
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peftrs.bases import store
from peftrs.core import manage
from peftrs.core import merge as merging
from peftrs.core.frozen import Ledger
from peftrs.core.tree import adapted_layers
from peftrs.errors import AdapterError, MergeError, PeftrsWarning
from peftrs.methods.ia3 import IA3Config
from peftrs.methods.lora import LoraConfig
from peftrs.ops.low_rank import Correction
from tests.laws.cases import (
    CASES,
    KINDS,
    TOLERANCE,
    WAYS_FOR,
    adapted,
    add,
    bits,
    config,
    distance,
    dtypes,
    fitted,
    ids,
    plain,
    same,
    seeds,
    sole_layer,
    stir,
)

cases = pytest.mark.parametrize("case", CASES, ids=ids)


@st.composite
def several(draw: st.DrawFn, count: int) -> tuple[str, list[str]]:
    """A kind of layer, and ways to adapt it together."""
    kind = draw(st.sampled_from([kind for kind in KINDS if WAYS_FOR[kind]]))
    return kind, draw(st.lists(st.sampled_from(WAYS_FOR[kind]), min_size=count, max_size=count))


@cases
@settings(max_examples=4)
@given(dtype=dtypes, wide=st.booleans(), seed=seeds)
def test_merged_gives_what_unmerged_gave(
    case: tuple[str, str], dtype: torch.dtype, wide: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    way, kind = case
    model = adapted([way], kind, dtype, autocast_adapter_dtype=wide)
    inputs = KINDS[kind].inputs(dtype)
    unmerged = model(*inputs)
    with manage.disabled(model):
        assert distance(unmerged, model(*inputs)) > 2 * TOLERANCE[dtype]
    manage.merge(model)
    assert unmerged.dtype is dtype
    assert distance(model(*inputs), unmerged) < TOLERANCE[dtype]


def check_order(kind: str, ways: list[str], dtype: torch.dtype) -> None:
    model = adapted(ways, kind, dtype)
    inputs = KINDS[kind].inputs(dtype)
    before = bits(model)
    for order in permutations("abc"[: len(ways)]):
        manage.set_adapter(model, order)
        unmerged = model(*inputs)
        manage.merge(model)
        assert distance(model(*inputs), unmerged) < len(ways) * TOLERANCE[dtype]
        assert sole_layer(model).merged_adapters == list(order)
        at_once = bits(model)
        manage.unmerge(list(adapted_layers(model)))
        assert same(bits(model), before)
        manage.merge(model, list(order[:-1]))
        with pytest.warns(PeftrsWarning, match="merged already"):
            manage.merge(model, [order[-1]])
        assert same(bits(model), at_once)
        manage.unmerge(list(adapted_layers(model)))


@settings(max_examples=80)
@given(drawn=several(2), dtype=dtypes, seed=seeds)
def test_two_adapters_merge_as_they_act_in_either_order(
    drawn: tuple[str, list[str]], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    check_order(*drawn, dtype)


@settings(max_examples=20)
@given(drawn=several(3), dtype=dtypes, seed=seeds)
def test_three_adapters_merge_as_they_act_in_any_order(
    drawn: tuple[str, list[str]], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    check_order(*drawn, dtype)


@pytest.mark.parametrize("kind", ["linear", "transposed", "embedding", "conv2d"])
def test_the_first_of_two_rotations_meets_the_input_first_or_an_embeddings_rows(kind: str) -> None:
    """`W·R_b·R_a·x`, and rows `e·R_a·R_b`: the order in which PEFT's forward goes through them."""
    model = adapted(["oft", "oft"], kind)
    one, other = fitted(model)
    base = sole_layer(model).base.dense(sole_layer(model).base_layer).weight
    rows = base.mT if kind == "embedding" else base.flatten(1)
    first, second = (
        torch.block_diag(*adapter.method.blocks(adapter, rows.dtype).expand(adapter.values["r"], -1, -1))
        for adapter in (one, other)
    )
    expected = rows @ first @ second if kind == "embedding" else rows @ second.mT @ first.mT
    manage.set_adapter(model, ["a", "b"])
    folded = sole_layer(model).folded().weight
    assert (
        distance(folded.mT if kind == "embedding" else folded.flatten(1), expected) < TOLERANCE[torch.float32]
    )
    assert distance(rows @ first @ second, rows @ second @ first) > 0.01


@pytest.mark.long
@settings(max_examples=3000)
@given(drawn=several(2) | several(3), dtype=dtypes, seed=seeds)
def test_any_adapters_merge_as_they_act_in_any_order(
    drawn: tuple[str, list[str]], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    check_order(*drawn, dtype)


def leave(model: nn.Module) -> nn.Module:
    return model


def train(model: nn.Module) -> nn.Module:
    stir(model)
    return model


def lose(model: nn.Module) -> nn.Module:
    """Takes the tensors away without asking, which `delete_adapter` would refuse."""
    for layer in adapted_layers(model):
        for adapter in layer.adapters.values():
            adapter.remove()
        layer.adapters.clear()
    return model


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def moved(model: nn.Module) -> nn.Module:
    """Gives every parameter new memory, as moving to another device does."""
    return model._apply(lambda tensor: tensor.clone())


MEANWHILE = [leave, train, lose, copy.deepcopy, pickled, saved, moved]


@cases
@pytest.mark.parametrize("meanwhile", MEANWHILE)
@settings(max_examples=2)
@given(dtype=dtypes, seed=seeds)
def test_unmerging_restores_the_bits(
    case: tuple[str, str], meanwhile: Callable[[nn.Module], nn.Module], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    way, kind = case
    model = plain(kind, dtype)
    with torch.no_grad():
        # Bits that arithmetic would not bring back: a negative zero, a subnormal number, one that swallows
        # any change.
        for parameter in model.parameters():
            parameter.view(-1)[:3] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 4, 3e4]).to(
                dtype
            )
    before = bits(model)
    add(model, config(way, kind), "a")
    stir(model)
    manage.merge(model)
    assert not same(bits(model), before)
    model = meanwhile(model)
    manage.unmerge(list(adapted_layers(model)))
    assert same(bits(model), before)


def large(dtype: torch.dtype = torch.bfloat16, layers: int = 2) -> nn.Module:
    """Layers beside whose weights the factors are small, so that a correction is kept."""
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(layers))).to(dtype).eval()
    add(
        model,
        LoraConfig(target_modules=[str(index) for index in range(layers)], r=2, init_lora_weights=False),
        "a",
    )
    stir(model)
    return model


def ledgers(model: nn.Module) -> list[Ledger]:
    return [layer.frozen.ledger for layer in adapted_layers(model) if layer.frozen.ledger is not None]


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "kind", ["linear", "transposed", "conv2d", "embedding", "experts", "experts-transposed", "attention"]
)
def test_corrections_restore_the_bits(
    kind: str,
    meanwhile: Callable[[nn.Module], nn.Module],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Also where the factors are as large as the layer, as they are here.
    monkeypatch.setattr(store, "MOST", 100.0)
    model = plain(kind, dtype)
    before = bits(model)
    add(model, config("lora", kind), "a")
    stir(model)
    manage.merge(model)
    assert isinstance(sole_layer(model).frozen.ledger.undo.kept[0], Correction)
    weight = next(iter(before.values()))
    assert torch.equal(merging.originals(sole_layer(model).frozen)[0].view(weight.dtype), weight)
    assert not same(bits(model), before)
    model = meanwhile(model)
    manage.unmerge(list(adapted_layers(model)))
    assert same(bits(model), before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_thousand_merges_leave_every_bit(dtype: torch.dtype) -> None:
    model = large(dtype, 1)
    before = bits(model)
    for _ in range(1000):
        manage.merge(model)
        manage.unmerge(list(adapted_layers(model)))
    assert same(bits(model), before)
    manage.merge(model)
    assert not same(bits(model), before)


def test_casting_a_merged_model_casts_what_it_was() -> None:
    model = large(torch.float32)
    expected = {
        name: tensor.view(torch.float32).half().view(torch.int16) for name, tensor in bits(model).items()
    }
    manage.merge(model)
    model.half()
    manage.unmerge(list(adapted_layers(model)))
    assert same(bits(model), expected)


def test_weights_changed_while_merged_are_subtracted_from_with_a_warning() -> None:
    model = large(torch.float32, 1)
    before = model.get_submodule("0").base_layer.weight.detach().clone()
    manage.merge(model)
    with torch.no_grad():
        model.get_submodule("0").base_layer.weight += 1
    with pytest.warns(PeftrsWarning, match="^0: the weights were changed since the merge"):
        manage.unmerge(list(adapted_layers(model)))
    assert distance(model.get_submodule("0").base_layer.weight, before + 1) < TOLERANCE[torch.float32]


def test_a_correction_is_smaller_than_the_original() -> None:
    model = large()
    manage.merge(model)
    assert all(0 < ledger.bytes < 40 * 40 * 2 for ledger in ledgers(model))


def interrupted(layers: list[nn.Module]):
    yield layers[0]
    raise KeyboardInterrupt


def test_a_merge_that_is_interrupted_is_taken_back() -> None:
    model = large()
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        manage.merge(model, track=interrupted)
    assert same(bits(model), before)
    assert ledgers(model) == []


def test_merging_for_good_keeps_nothing_and_can_be_finished_after_an_interrupt() -> None:
    model, other = (copied := large()), copy.deepcopy(copied)
    x = torch.randn(3, 40).bfloat16()
    expected = model(x)
    with pytest.raises(KeyboardInterrupt):
        manage.unload(model, merged=True, track=interrupted)
    assert [ledger.undo for ledger in ledgers(model)] == [None]
    assert distance(model(x), expected) < TOLERANCE[torch.bfloat16]
    with pytest.raises(MergeError, match=r"^0: .* merged for good.*hint: "):
        manage.unmerge(list(adapted_layers(model)))
    with pytest.warns(PeftrsWarning, match="are merged already"):
        manage.unload(model, merged=True)
    manage.unload(other, merged=True)
    assert same(bits(model), bits(other))


@cases
def test_unloading_merged_leaves_the_plain_model_with_the_adapters_output(case: tuple[str, str]) -> None:
    way, kind = case
    model = adapted([way], kind)
    inputs = KINDS[kind].inputs(torch.float32)
    expected = model(*inputs)
    manage.unload(model, merged=True)
    assert list(adapted_layers(model)) == []
    assert model.state_dict().keys() == plain(kind).state_dict().keys()
    assert distance(model(*inputs), expected) < TOLERANCE[torch.float32]


@cases
def test_unloading_unmerged_leaves_the_bits_from_before(case: tuple[str, str]) -> None:
    way, kind = case
    model = plain(kind)
    before = bits(model)
    add(model, config(way, kind), "a")
    stir(model)
    manage.merge(model)
    manage.unload(model, merged=False)
    assert list(adapted_layers(model)) == []
    assert same(bits(model), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_merge_that_overflows_is_refused_and_takes_everything_back(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.float16)
    add(model, IA3Config(target_modules=["0", "1"], feedforward_modules=[]), "a")
    before = bits(model)
    last = list(fitted(model))[-1]
    with torch.no_grad():
        last["ia3_l"].fill_(value)
    with pytest.raises(MergeError, match=r"^1: "):
        manage.merge(model)
    assert same(bits(model), before)
    assert not any(layer.merged for layer in adapted_layers(model))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}], ids=["low rank", "with a bias"])
def test_an_overflow_of_one_layer_is_refused_before_any_is_changed(
    keep: bool, settings: dict[str, bool]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.float16)
    add(model, LoraConfig(target_modules=["0", "1"], r=1, init_lora_weights=False, **settings), "a")
    before = bits(model)
    with torch.no_grad():
        list(fitted(model))[-1]["lora_A.weight"].fill_(1e5)
        list(fitted(model))[-1]["lora_B.weight"].fill_(1)
    with pytest.raises(MergeError, match=r"^1: merging .* gives weights beyond torch.float16"):
        manage.merge(model, keep=keep)
    assert same(bits(model), before)
    assert ledgers(model) == []


@pytest.mark.parametrize("way", ["lora", "ia3-outputs"])
def test_weights_that_were_not_finite_stay_so_with_a_warning(way: str) -> None:
    model = plain("linear", torch.float16)
    with torch.no_grad():
        model.layer.weight[3, 4] = torch.inf
    before = bits(model)
    add(model, config(way, "linear"), "a")
    stir(model)
    with pytest.warns(PeftrsWarning, match="^layer: some weights were infinite or NaN before the merge"):
        manage.merge(model)
    assert torch.isinf(sole_layer(model).base_layer.weight[3, 4])
    manage.unmerge(list(adapted_layers(model)))
    assert same(bits(model), before)


@pytest.mark.filterwarnings("ignore:.*are merged already:peftrs.errors.PeftrsWarning")
@pytest.mark.parametrize("broken", ["0", "1"])
def test_a_refused_merge_leaves_what_was_merged_before(broken: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.float16)
    for name in "ab":
        add(model, IA3Config(target_modules=["0", "1"], feedforward_modules=[]), name)
    stir(model)
    manage.merge(model, ["a"])
    before = bits(model)
    layer = model.get_submodule(broken)
    with torch.no_grad():
        layer.adapters["b"]["ia3_l"].fill_(1e6)
    with pytest.raises(MergeError, match=rf"^{broken}: "):
        manage.merge(model, ["b"])
    assert same(bits(model), before)
    assert [layer.merged_adapters for layer in adapted_layers(model)] == [["a"], ["a"]]


def test_merging_an_unknown_adapter_is_refused() -> None:
    model = adapted(["lora"], "linear")
    with pytest.raises(AdapterError, match="Adapter z not found"):
        manage.merge(model, ["z"])


def test_a_merged_adapter_cannot_be_deleted() -> None:
    model = adapted(["lora"], "linear")
    manage.merge(model)
    with pytest.raises(AdapterError, match="unmerge it first"):
        manage.delete_adapter(model, "a")


def test_a_merge_is_told_to_autograd() -> None:
    model = adapted(["lora"], "linear")
    weight = sole_layer(model).base_layer.weight
    (weight.detach().requires_grad_() * weight).sum()
    version = weight._version
    manage.merge(model)
    assert weight._version > version
