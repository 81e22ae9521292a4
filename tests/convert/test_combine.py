"""The algebra of low rank: sums and best approximations agree with dense ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peftrs.convert.combine import (
    Factors,
    approximated,
    clamped,
    leading,
    padded,
    scaled,
    stacked,
    thin,
    truncated,
)


def term(rows: int, rank: int, columns: int, *stack: int) -> Factors:
    return torch.randn(*stack, rows, rank, dtype=torch.float64), torch.randn(
        *stack, rank, columns, dtype=torch.float64
    )


def dense(term: Factors) -> Tensor:
    return term[0] @ term[1]


sizes = st.integers(1, 12)


@given(
    rows=sizes,
    columns=sizes,
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    rank=sizes,
    seed=st.integers(0, 9),
)
def test_truncation_is_the_best_approximation(
    rows: int, columns: int, ranks: list[int], rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    terms = [term(rows, each, columns) for each in ranks]
    whole = torch.stack([dense(each) for each in terms]).sum(0)
    torch.testing.assert_close(dense(stacked(terms)), whole)
    found = truncated(stacked(terms), rank)
    assert found[0].shape[1] == found[1].shape[0] <= min(rank, rows, columns)
    least = torch.linalg.svdvals(whole)[rank:].norm()
    assert torch.linalg.matrix_norm(dense(found) - whole) <= least + 1e-10 * whole.norm()


@pytest.mark.parametrize("stack", [(), (3,)], ids=["matrix", "stack"])
def test_both_decompositions_are_the_same(stack: tuple[int, ...]) -> None:
    factors = term(300, 9, 200, *stack)
    for rank in (3, 9):
        torch.testing.assert_close(
            dense(scaled(leading(dense(factors), rank))), dense(scaled(thin(factors, rank)))
        )


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_a_krylov_space_holds_nearly_all_that_a_rank_can(decay: float) -> None:
    values = torch.arange(1, 401, dtype=torch.float32) ** -decay
    left, right = (torch.linalg.qr(torch.randn(size, 400))[0] for size in (500, 400))
    whole = (left * values) @ right
    found = dense(scaled(leading(whole, 8)))
    assert (found - whole).norm() <= values[8:].norm() + 1e-4 * values.norm()


def test_random_numbers_are_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second = (leading(torch.ones(200, 300), 2)[0] for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, second)


@given(energy=st.floats(0.01, 1.0), cap=st.integers(1, 40), rank=st.integers(1, 40), seed=st.integers(0, 9))
def test_an_energy_takes_the_smallest_rank_that_keeps_it(
    energy: float, cap: int, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    factors = term(60, rank, 50)
    squares = torch.linalg.svdvals(dense(factors)) ** 2
    parts = squares.cumsum(0) / squares.sum()
    for change in (factors, dense(factors)):
        found, kept = approximated(change, cap, energy)
        taken = found[0].shape[1]
        assert taken <= cap
        assert kept == pytest.approx(float(parts[taken - 1]))
        assert kept >= energy * (1 - 1e-9) or taken in (cap, rank)
        assert taken == 1 or parts[taken - 2] < energy * (1 + 1e-9)
        residue = (dense(found) - dense(factors)).square().sum() / squares.sum()
        assert float(residue) == pytest.approx(1 - kept, abs=1e-9)


def test_a_change_of_nothing_is_kept_whole() -> None:
    for change in (torch.zeros(5, 4), (torch.zeros(5, 2), torch.zeros(2, 4))):
        found, kept = approximated(change, 2, 0.9)
        assert kept == 1.0
        assert not dense(found).any()


@given(quantile=st.floats(0, 1), seed=st.integers(0, 9))
def test_clamping_is_at_the_quantile_of_all_entries(quantile: float, seed: int) -> None:
    torch.manual_seed(seed)
    factors = term(8, 3, 6)
    entries = torch.cat([factor.flatten() for factor in factors])
    bound = torch.quantile(entries, quantile)
    for found, factor in zip(clamped(factors, quantile), factors, strict=True):
        torch.testing.assert_close(found, factor.clamp(-bound, bound))


def test_padding_changes_nothing() -> None:
    factors = term(4, 2, 3, 5)
    up, down = padded(factors, 6)
    assert up.shape == (5, 4, 6)
    assert down.shape == (5, 6, 3)
    assert torch.equal(dense((up, down)), dense(factors))
    assert padded(factors, 2) is factors
