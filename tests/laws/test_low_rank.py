"""The low-rank update of a weight: rounded once, the same whatever the threads, and taken out again to the
bit.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peftrs import LoraConfig, _native, get_peft_model
from peftrs.dtype import FLOATS, NAMES
from peftrs.errors import MergeError
from peftrs.ops.low_rank import NATIVE, ROWS, Correction, Update, add_low_rank_, overflows
from tests.laws.cases import dtypes, seeds
from tests.ops.accounting import Largest, Ledger

# Around the sizes of the kernel's tiles and panels, and of torch's blocks of rows.
sizes = st.integers(1, 70) | st.sampled_from([ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 3])
INTEGERS = {2: torch.int16, 4: torch.int32}


def drawn(rows: int, columns: int, rank: int, dtype: torch.dtype, spread: int = 0) -> tuple[Tensor, Update]:
    weight = (torch.randn(rows, columns) * 10.0**spread).to(dtype)
    return weight, Update(torch.randn(rows, rank), torch.randn(rank, columns), 0.7)


def exact(weight: Tensor, update: Update) -> Tensor:
    return weight.double() + update.scaling * (update.up.double() @ update.down.double())


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values rounded to the nearest of the dtype, without the detour over float32 that torch
    takes.
    """
    kind = torch.finfo(dtype)
    _, exponent = torch.frexp(values)
    least = torch.frexp(torch.tensor(kind.smallest_normal)).exponent
    unit = torch.exp2((exponent.maximum(least) - 1).double()) * kind.eps
    return ((values / unit).round() * unit).to(dtype)


def unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from each value to the next larger one of the dtype, in float64."""
    kind = torch.finfo(dtype)
    return kind.eps * torch.exp2(values.double().abs().clamp_min(kind.smallest_normal).log2().floor())


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


def added(weight: Tensor, update: Update) -> Tensor:
    add_low_rank_(weight, update)
    return weight


@settings(max_examples=60)
@given(
    rows=sizes, columns=sizes, rank=st.integers(1, 40), dtype=dtypes, spread=st.integers(-3, 2), seed=seeds
)
def test_rust_is_within_one_unit_of_torch(
    rows: int, columns: int, rank: int, dtype: torch.dtype, spread: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, update = drawn(rows, columns, rank, dtype, spread)
    wide = NATIVE[dtype]
    expected = (weight.to(wide) + update.scaling * (update.up.to(wide) @ update.down.to(wide))).to(dtype)
    summed = weight.double().abs() + update.up.double().abs() @ update.down.double().abs()
    version = weight._version
    finite, correction = add_low_rank_(weight, update)
    assert finite
    assert correction is None
    assert weight._version > version
    # Where the terms cancel, the order in which they were added shows: each addition may round by one unit of
    # the wide dtype.
    slack = unit(expected, dtype) + 2 * (rank + 1) * torch.finfo(wide).eps * summed
    assert bool(((weight.double() - expected.double()).abs() <= slack).all())


@pytest.mark.parametrize("size", [0.001, 0.03, 0.3], ids=lambda size: f"update {size} of the weight")
@pytest.mark.parametrize("factors", sorted(FLOATS, key=str), ids=str)
@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_weights_are_the_exact_sums_rounded_once(
    dtype: torch.dtype, factors: torch.dtype, size: float
) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(600, 1000) * 0.02).to(dtype)
    update = Update(torch.randn(600, 16).to(factors) / 4, torch.randn(16, 1000).to(factors), 0.02 * size)
    expected = rounded(exact(weight, update), dtype)
    assert torch.count_nonzero(added(weight, update) != expected) <= 0.00005 * weight.numel()


@settings(max_examples=30)
@given(rows=sizes, columns=st.integers(1, 70), rank=st.integers(1, 8), dtype=dtypes, seed=seeds)
def test_strides_and_stacking_do_not_show(
    rows: int, columns: int, rank: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    weights, updates = zip(*(drawn(rows, columns, rank, dtype) for _ in range(2)), strict=True)
    ups, downs = ([getattr(update, name) for update in updates] for name in ("up", "down"))
    stack = added(torch.stack(weights), Update(torch.stack(ups), torch.stack(downs), 0.7))
    for result, weight, update in zip(stack, weights, updates, strict=True):
        strided = Update(update.up.mT.contiguous().mT, update.down.mT.contiguous().mT, update.scaling)
        assert torch.equal(result, added(weight.clone(), strided))
        turned = Update(update.down.mT, update.up.mT, update.scaling).transposed()
        assert torch.equal(result, added(weight.clone(), turned))
        assert torch.equal(result, added(weight, update))


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    rows, columns, rank = 1531, 1033, 9
    weight, update = drawn(rows, columns, rank, dtype)
    results = []
    for threads in (1, 2, 7):
        own = weight.clone()
        given_weight = (own.data_ptr(), NAMES[dtype], (rows, columns), (columns, 1))
        up = (update.up.data_ptr(), "F32", (rows, rank), (rank, 1))
        down = (update.down.data_ptr(), "F32", (rank, columns), (columns, 1))
        _, code = _native.add_low_rank(given_weight, (up, down, update.scaling, threads), True)
        results.append((own, code))
    for own, code in results:
        assert torch.equal(bits(own), bits(results[0][0]))
        assert code == results[0][1]
    assert not torch.equal(results[0][0], weight)


@settings(max_examples=60)
@given(rows=sizes, columns=sizes, rank=st.integers(1, 9), dtype=dtypes, spread=st.integers(-6, 2), seed=seeds)
def test_a_correction_restores_every_bit(
    rows: int, columns: int, rank: int, dtype: torch.dtype, spread: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, update = drawn(rows, columns, rank, dtype, spread)
    special = torch.tensor(
        [-0.0, 0.0, torch.finfo(dtype).smallest_normal / 4, 3e4, torch.inf, -torch.inf, torch.nan]
    )
    weight.view(-1)[: len(special)] = special[: weight.numel()].to(dtype)
    before = weight.clone()
    finite, correction = add_low_rank_(weight, update, keep=True)
    assert isinstance(correction, Correction)
    assert finite is bool(weight.isfinite().all())
    update.up.zero_()
    assert correction.restore_(weight)
    assert torch.equal(bits(weight), bits(before))


def test_a_correction_takes_little_room() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(2048, 1024) * 0.02).bfloat16()
    update = Update(torch.randn(2048, 16) / 4, torch.randn(16, 1024), 0.005)
    _, correction = add_low_rank_(weight, update, keep=True)
    assert correction is not None
    assert correction.bytes <= 0.25 * weight.numel()


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [*NATIVE, torch.float64], ids=str)
def test_the_blocks_of_torch_do_what_the_kernel_does(
    dtype: torch.dtype, factors: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2 * ROWS + 3, 40).to(dtype)
    update = Update(torch.randn(2 * ROWS + 3, 4).to(factors), torch.randn(4, 40).to(factors), 0.3)
    expected, before = rounded(exact(weight, update), dtype), weight.clone()
    with monkeypatch.context() as patch:
        patch.setattr("peftrs.ops.low_rank._kernel_takes", lambda _: False)
        _, correction = add_low_rank_(weight, update, keep=dtype in NATIVE)
    summed = before.double().abs() + update.up.double().abs() @ update.down.double().abs()
    slack = unit(expected, dtype) + 10 * torch.finfo(NATIVE.get(dtype, dtype)).eps * summed
    assert bool(((weight.double() - expected.double()).abs() <= slack).all())
    if correction is not None:
        assert correction.restore_(weight)
        assert torch.equal(bits(weight), bits(before))


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "blocks"])
def test_a_merge_makes_no_tensor_of_the_weights_size(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = 4 * ROWS, 96
    model = nn.Sequential(nn.Linear(columns, rows)).bfloat16()
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    if not native:
        monkeypatch.setattr("peftrs.ops.low_rank._kernel_takes", lambda _: False)
    before = model[0].weight.clone()
    with Largest() as largest:
        merged = adapted.merge_and_unload()
    assert not torch.equal(merged[0].weight, before)
    assert largest.elements <= ROWS * columns


def test_a_merge_leaves_the_work_to_the_kernels_threads() -> None:
    model = nn.Sequential(nn.Linear(48, 32)).bfloat16()
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    with Ledger() as ledger:
        adapted.merge_and_unload()
    assert ledger.operations == 0


@settings(max_examples=60)
@given(rows=sizes, columns=sizes, dtype=st.sampled_from(sorted(FLOATS, key=str)), seed=seeds)
def test_the_reach_is_found_whatever_the_strides(
    rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    whole = torch.randn(2, rows + 2, 3 * columns).to(dtype)
    for matrix in (
        whole[0],
        whole[1, 1:-1, :columns],
        whole[1, :, ::3],
        whole[0].mT,
        whole[1, ::2, 1::3].mT,
        whole,
    ):
        update = Update(matrix, torch.full((matrix.shape[-1], 2), -2.0), 0.5)
        assert update.reach == matrix.shape[-1] * float(matrix.abs().max())


@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_the_reach_of_what_is_no_number_is_not_finite(value: float, dtype: torch.dtype) -> None:
    factor = torch.ones(17, 67, dtype=dtype)
    factor[16, 66] = value
    assert Update(factor, torch.ones(67, 1), 1.0).reach == torch.inf
    assert Update(factor[:, :0], torch.ones(0, 1), 1.0).reach == 0.0


@pytest.mark.parametrize(
    ("weight", "scaling", "expected"),
    [(65504.0, 15.0, False), (65504.0, 17.0, True), (1.0, 70000.0, True), (torch.inf, 17.0, False)],
)
def test_an_overflow_is_foreseen(weight: float, scaling: float, expected: bool) -> None:
    held = torch.full((3, 5), weight, dtype=torch.float16)
    assert overflows(held, Update(torch.ones(3, 1), torch.ones(1, 5), scaling)) is expected
    assert bool((held == weight).all())


def test_a_damaged_correction_is_refused() -> None:
    weight, update = drawn(30, 40, 2, torch.bfloat16)
    _, correction = add_low_rank_(weight, update, keep=True)
    assert correction is not None
    for code in (b"", correction.codes[0][:-1], correction.codes[0] + b"x", b"x" + correction.codes[0][1:]):
        with pytest.raises(MergeError, match="damaged"):
            Correction(correction.update, correction.dtype, (code,)).restore_(weight)
