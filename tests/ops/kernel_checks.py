"""What holds of Triton's kernels on whatever runs them: a GPU, or Triton's interpreter on the CPU.

`test_triton.py` runs this file in a process of its own with `TRITON_INTERPRET=1`, `make test-gpu` as it is.
Deterministic algorithms are on throughout, which also fills what `torch.empty` gives with NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from peftrs.ops.lora_linear import function, library, reference, triton
from peftrs.ops.lora_linear.reference import Dropout
from tests.laws.cases import distance
from tests.ops.masks import assert_fair

DEVICE = "cpu" if triton.INTERPRETED else "cuda"
# The interpreter cuts float32 down to bfloat16 where a device rounds, which is twice as far off.
UNIT = {
    torch.float32: 2.0**-22,
    torch.bfloat16: 2.0 ** (-8 if triton.INTERPRETED else -9),
    torch.float16: 2.0**-12,
}
NARROW = [torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", list(UNIT), ids=str)

# Rows, in, out, rank: within a tile, astride its edge, in several, at each padded rank.
SHAPES = [(1, 30, 9, 1), (33, 70, 45, 5), (65, 129, 67, 17), (20, 72, 96, 33), (40, 64, 33, 100)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def seeded(share: float = 0.7, seed: int = 2**40 + 7) -> Dropout:
    return Dropout(round((1 - share) * 2**16), torch.tensor([seed], device=DEVICE))


def arguments(shape: tuple[int, int, int, int], dtype: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
    rows, width, out, rank = shape
    made = {
        "x": torch.randn(rows, width).to(dtype), "weight": (torch.randn(out, width) / width**0.5).to(dtype),
        "bias": torch.randn(out).to(dtype), "down": (torch.randn(rank, width) / width**0.5).to(wide),
        "up": (torch.randn(out, rank) / rank**0.5).to(wide), "dy": torch.randn(rows, out).to(dtype),
    }  # fmt: skip
    return {name: value.to(DEVICE) for name, value in made.items()}


def run(
    given: dict[str, Tensor], dropout: Dropout | None, needs: tuple[bool, bool, bool], scaling: float
) -> list[Tensor | None]:
    """`u`, `y` and the gradients."""
    x, weight, bias, down, up, dy = given.values()
    assert triton.fits(x, down)
    u = triton.low(x, down, dropout)
    y = triton.high(u, x, weight, bias, up, scaling)
    return [u, y, *triton.backward(dy, x, weight, down, up, u, scaling, dropout, needs)]


def exact(given: dict[str, Tensor], kept: Tensor | float, scaling: float) -> list[Tensor]:
    leaves = {name: value.double().requires_grad_() for name, value in given.items()}
    x, weight, bias, down, up, dy = leaves.values()
    u = (x * kept) @ down.mT
    y = x @ weight.mT + bias + scaling * u @ up.mT
    return [u, y, *torch.autograd.grad(y, [x, down, up], dy)]


def check(
    given: dict[str, Tensor], dropout: Dropout | None, needs: tuple[bool, bool, bool] = (True, True, True)
) -> None:
    dtype, wide = given["x"].dtype, given["down"].dtype
    kept = 1.0 if dropout is None else triton.mask(*given["x"].shape, dropout).double()
    names = ("u", "y", "x", "down", "up")
    for name, one, other, needed in zip(
        names, run(given, dropout, needs, -1.7), exact(given, kept, -1.7), (True, True, *needs), strict=True
    ):
        assert (one is not None) is needed
        if one is not None:
            assert one.dtype == (dtype if name in ("y", "x") else wide)
            assert distance(one, other) < (2.0**-15 if name == "u" and wide != dtype else 4 * UNIT[dtype]), (
                name
            )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "wide"), [*((one, torch.float32) for one in UNIT), *((one, one) for one in NARROW)], ids=str
)
def test_every_result_lies_at_the_rounding_of_its_dtype(
    dtype: torch.dtype, wide: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    given = arguments(shape, dtype, wide)
    check(given, seeded())
    if shape[-1] < 10:
        check(given, None)


@pytest.mark.parametrize("rank", [5, 40])
@pytest.mark.parametrize(
    "needs", [(False, True, True), (True, False, True), (True, True, False), (False, False, True)], ids=str
)
def test_only_the_gradients_asked_for_are_made(needs: tuple[bool, bool, bool], rank: int) -> None:
    check(arguments((17, 40, 30, rank), torch.float16, torch.float32), seeded(), needs)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-4], ids=["", "small"])
def test_float32_factors_lose_nothing_to_the_narrow_dtype(dtype: torch.dtype, size: float) -> None:
    given = arguments((30, 256, 64, 16), dtype, torch.float32)
    given["down"] *= size
    given["up"] /= size
    given["weight"] *= 0
    u, y, *_ = run(given, None, (False, False, False), 1.0)
    wanted = exact(given, 1.0, 1.0)
    assert distance(u, wanted[0]) < 2.0**-15
    rounded = distance(wanted[1].to(dtype), wanted[1])
    assert (
        distance(y, wanted[1]) < (2.1 if dtype is torch.bfloat16 and triton.INTERPRETED else 1.01) * rounded
    )


@dtypes
def test_results_repeat_to_the_bit(dtype: torch.dtype) -> None:
    given = arguments((70, 90, 40, 20), dtype, torch.float32)
    first, again = (run(given, seeded(), (True, True, True), 1.5) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_any_strides_do() -> None:
    given = arguments((70, 90, 40, 20), torch.float16, torch.float32)
    given |= {name: given[name].mT.contiguous().mT for name in ("weight", "down", "up", "dy")}
    given["x"] = torch.cat([given["x"], given["x"]], 1)[:, ::2]
    check(given, seeded())
    given["dy"] = given["dy"][:1].expand(70, 40)
    check(given, seeded())


@pytest.mark.parametrize("processors", [1, 100])
def test_sums_cut_into_any_number_of_parts_agree(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_processors", lambda _: processors)
    for rank in (3, 40):
        given = arguments((130, 140, 70, rank), torch.float32, torch.float32)
        for one, other in zip(run(given, None, (True, True, True), 1.0), exact(given, 1.0, 1.0), strict=True):
            assert distance(one, other) < 4 * UNIT[torch.float32]


def test_offsets_beyond_32_bits_reach_their_elements() -> None:
    gap = 2**30 + 8
    x = torch.empty(0, dtype=torch.float16, device=DEVICE)
    with torch.no_grad():
        torch.use_deterministic_algorithms(False)  # so that the gaps between rows take no memory
        x = torch.empty(3 * gap, dtype=torch.float16, device=DEVICE).as_strided((4, 8), (gap - 8, 1))
        torch.use_deterministic_algorithms(True)
    given = arguments((4, 8, 5, 2), torch.float16, torch.float32)
    x.copy_(given["x"])
    wanted = run(given, seeded(), (True, True, True), 1.0)
    given["x"] = x
    assert all(
        torch.equal(one, other)
        for one, other in zip(run(given, seeded(), (True, True, True), 1.0), wanted, strict=True)
    )


def philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Philox4x32 as its paper defines it."""
    low = 2**32 - 1
    for _ in range(rounds):
        one, two = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(two >> 32) ^ counter[1] ^ key[0], two & low, (one >> 32) ^ counter[3] ^ key[1], one & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter


def test_the_generator_is_the_one_that_was_tested_by_others() -> None:
    """The known answers of the authors' own library, Random123."""
    assert philox([0, 0, 0, 0], [0, 0], 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert philox([2**32 - 1] * 4, [2**32 - 1] * 2, 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_the_mask_follows_from_the_seed_and_the_place_alone() -> None:
    dropout = seeded(0.6, seed=-3)
    found = triton.mask(70, 90, dropout)
    key = [(-3) & (2**32 - 1), ((-3) >> 32) & (2**32 - 1)]
    for row, column in ((0, 0), (0, 7), (1, 8), (69, 89), (33, 64), (64, 33)):
        word = philox([column // 8, row, 0, 0], key, 7)[column % 8 // 2]
        assert bool(found[row, column]) is ((word >> 16 * (column % 2)) & 0xFFFF >= dropout.dropped)
    assert torch.equal(triton.mask(100, 200, dropout)[:70, :90], found)


@pytest.mark.parametrize("kept", [0.95, 0.5])
def test_dropout_keeps_its_share_of_independent_elements(kept: float) -> None:
    masks = [triton.mask(400, 300, seeded(kept, seed)).double() for seed in (1, 2)]
    for mask in masks:
        assert_fair(mask, kept)
    covariance = ((masks[0] - kept) * (masks[1] - kept)).mean()  # seeds know nothing of each other either
    assert abs(float(covariance)) < 4.5 * kept * (1 - kept) / masks[0].numel() ** 0.5


@dtypes
def test_the_passes_drop_what_the_mask_drops(dtype: torch.dtype) -> None:
    """Plain operations with the mask in memory agree with the kernels, which never write it."""
    given = arguments((70, 130, 40, 9), dtype, dtype)
    dropout = seeded(0.5)
    mask = triton.mask(70, 130, dropout)
    held = SimpleNamespace(mask=lambda _: mask)
    x, weight, bias, down, up, dy = given.values()
    u = reference.low(x, down, held)
    wanted = [
        u,
        reference.high(u, x, weight, bias, up, 2.0),
        *reference.backward(dy, x, weight, down, up, u, 2.0, held, (True,) * 3),
    ]
    for one, other in zip(run(given, dropout, (True, True, True), 2.0), wanted, strict=True):
        assert distance(one, other) < 6 * UNIT[dtype]


@pytest.mark.parametrize("compiled", [False, True], ids=["function", "operator"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_autograd_over_the_kernels_is_that_of_the_formula(
    autocast: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function, "passes", lambda *_: triton)
    dtype = torch.float32 if autocast else torch.bfloat16
    given = arguments((33, 70, 45, 5), dtype, torch.float32)
    x, weight, bias, down, up, dy = given.values()
    given["x"], given["dy"] = x, dy = x.view(3, 11, 70), dy.view(3, 11, 45)
    leaves = [one.requires_grad_() for one in (x, down, up)]
    dropout = seeded()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        if compiled:
            y = library.operator(x, weight, bias, down, up, -1.7, *dropout)
        else:
            narrow = torch.bfloat16 if autocast else dtype
            y = function.LoraLinear.apply(x, weight.to(narrow), bias.to(narrow), down, up, -1.7, dropout)
    kept = triton.mask(33, 70, dropout).view(3, 11, 70).double()
    assert y.dtype is torch.bfloat16
    found = [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]
    assert [one.dtype for one in found[1:]] == [one.dtype for one in leaves]
    for one, other in zip(found, exact(given, kept, -1.7)[1:], strict=True):
        assert distance(one, other) < 6 * UNIT[torch.bfloat16]
