"""A fresh adapter changes nothing where its start promises so, and has the tensors and dtypes that it
says.
"""

import pytest
import torch
from hypothesis import given, settings

from peftrs.core import manage
from tests.laws.cases import (
    CASES,
    KINDS,
    TOLERANCE,
    WAYS,
    adapted,
    add,
    config,
    distance,
    dtypes,
    fitted,
    ids,
    plain,
    seeds,
    stir,
)

cases = pytest.mark.parametrize("case", CASES, ids=ids)


@cases
@settings(max_examples=3)
@given(dtype=dtypes, seed=seeds)
def test_a_fresh_adapter_changes_nothing_where_its_start_promises_so(
    case: tuple[str, str], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    way, kind = case
    model = plain(kind, dtype)
    inputs = KINDS[kind].inputs(dtype)
    expected = model(*inputs)
    add(model, config(way, kind), "a")
    assert (distance(model(*inputs), expected) < TOLERANCE[dtype]) is WAYS[way].neutral
    stir(model)
    assert distance(model(*inputs), expected) > TOLERANCE[dtype]
    with manage.disabled(model):
        assert torch.equal(model(*inputs), expected)


@cases
def test_a_second_adapter_changes_nothing_while_the_first_is_active(case: tuple[str, str]) -> None:
    way, kind = case
    model = adapted([way], kind)
    inputs = KINDS[kind].inputs(torch.float32)
    expected = model(*inputs)
    add(model, config(way, kind), "b")
    stir_second = [adapter for adapter in fitted(model) if adapter.name == "b"]
    with torch.no_grad():
        for adapter in stir_second:
            for _, parameter in adapter.parameters():
                parameter.add_(1)
    assert torch.equal(model(*inputs), expected)
    assert not any(
        parameter.requires_grad for adapter in stir_second for _, parameter in adapter.parameters()
    )
    manage.delete_adapter(model, "b")
    assert torch.equal(model(*inputs), expected)
    assert [adapter.name for adapter in fitted(model)] == ["a"] * len(stir_second)


@cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_narrow_weights_are_float32_unless_told_otherwise(
    case: tuple[str, str], dtype: torch.dtype
) -> None:
    way, kind = case
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = adapted([way], kind, dtype, autocast_adapter_dtype=autocast)
        assert {parameter.dtype for adapter in fitted(model) for _, parameter in adapter.parameters()} == {
            expected
        }
        assert model(*KINDS[kind].inputs(dtype)).dtype is dtype
