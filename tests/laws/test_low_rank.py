"""The low-rank update of a weight: Rust and torch agree within one unit in the last place, whatever the number of threads."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftrs.ops.low_rank import NATIVE, ROWS, add_low_rank_
from tests.laws.cases import dtypes, seeds

# Around the sizes of the kernel's tiles and panels, and of torch's blocks of rows.
sizes = st.integers(1, 70) | st.sampled_from([ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 3])


def factors(rows: int, columns: int, rank: int, dtype: torch.dtype, spread: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = NATIVE[dtype][1]
    weight = (torch.randn(rows, columns) * 10.0**spread).to(dtype)
    return weight, torch.randn(rows, rank, dtype=wide), torch.randn(rank, columns, dtype=wide)


def unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from each value to the next larger one of the dtype, in float64."""
    kind = torch.finfo(dtype)
    exponent = values.double().abs().clamp_min(kind.smallest_normal).log2().floor()
    return kind.eps * torch.exp2(exponent)


@settings(max_examples=60)
@given(rows=sizes, columns=sizes, rank=st.integers(1, 40), dtype=dtypes, spread=st.integers(-3, 2), seed=seeds)
def test_rust_is_within_one_unit_of_torch(rows: int, columns: int, rank: int, dtype: torch.dtype, spread: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, up, down = factors(rows, columns, rank, dtype, spread)
    expected = (weight.to(up.dtype) + up @ down).to(dtype)
    summed = weight.double().abs() + up.double().abs() @ down.double().abs()
    version = weight._version
    assert add_low_rank_(weight, up, down) is weight
    assert weight._version > version
    # Where the terms cancel, the order in which they were added shows: each addition may round by one unit of the wide dtype.
    slack = unit(expected, dtype) + 2 * (rank + 1) * torch.finfo(up.dtype).eps * summed
    assert bool(((weight.double() - expected.double()).abs() <= slack).all())


@settings(max_examples=30)
@given(rows=sizes, columns=st.integers(1, 70), rank=st.integers(1, 8), dtype=dtypes, seed=seeds)
def test_strides_and_stacking_do_not_show(rows: int, columns: int, rank: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    weights, ups, downs = zip(*(factors(rows, columns, rank, dtype, 0) for _ in range(2)), strict=True)
    stack = add_low_rank_(torch.stack(weights), torch.stack(ups), torch.stack(downs))
    for result, weight, up, down in zip(stack, weights, ups, downs, strict=True):
        strided = add_low_rank_(weight.clone(), up.mT.contiguous().mT, down.mT.contiguous().mT)
        assert torch.equal(result, strided)
        assert torch.equal(result, add_low_rank_(weight, up, down))


# Without torch, whose import would take longer than all else here.
PROGRAM = """
import ctypes, sys
from peftrs import _native
dtype, *sizes = sys.argv[1:]
rows, columns, rank, *lengths = map(int, sizes)
memory = [ctypes.create_string_buffer(sys.stdin.buffer.read(length), length) for length in lengths]
weight, up, down = map(ctypes.addressof, memory)
_native.add_low_rank(weight, dtype, rows, columns, up, down, rank, 1.0)
sys.stdout.buffer.write(memory[0].raw)
"""


def raw(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    rows, columns, rank = 1531, 1033, 9
    tensors = factors(rows, columns, rank, dtype, 0)
    memory = [raw(tensor) for tensor in tensors]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, NATIVE[dtype][0], *map(str, (rows, columns, rank, *map(len, memory)))],
        env=os.environ | {"RAYON_NUM_THREADS": str(threads)},
        input=b"".join(memory),
        capture_output=True,
        check=True,
    )
    assert result.stdout == raw(add_low_rank_(*tensors)) != memory[0]
