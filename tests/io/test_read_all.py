"""Many tensors read at once: the file's bits, whether they are finite, and no memory but what was lent for
it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftrs import CheckpointError, MergeError, _native
from peftrs.io.checkpoint import PREFIX, FileSource, MemorySource, Renamed

BIG = 300_001
"""More elements than are read in one piece."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {"big": torch.randn(BIG), "half": torch.randn(7).half(), "whole": torch.arange(5)}
    tensors["late"] = torch.randn(BIG).index_fill(0, torch.tensor([BIG - 1]), torch.inf)
    tensors["nan"] = torch.tensor([1.0, torch.nan]).bfloat16()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_the_bits_of_the_file_come_under_their_names(folder: Path) -> None:
    source = FileSource(str(folder))
    names = sorted(source.described(), reverse=True)
    read, odd = source.read_all(names)
    assert (list(read), odd) == (names, ["nan", "late"])
    for name, value in read.items():
        same = source.read(name)
        assert (value.dtype, value.shape) == (same.dtype, same.shape)
        assert torch.equal(value.flatten().view(torch.uint8), same.flatten().view(torch.uint8))


def test_other_sources_tell_the_same(folder: Path) -> None:
    source = FileSource(str(folder))
    held = MemorySource({PREFIX + name: source.read(name) for name in source.described()}, "memory")
    for other, rename in (
        (held, lambda name: PREFIX + name),
        (Renamed(held, {"^": "x."}), lambda name: f"{PREFIX}x.{name}"),
    ):
        assert other.described()[rename("big")] == (torch.float32, (BIG,))
        read, odd = other.read_all([rename("nan"), rename("big")])
        assert odd == [rename("nan")]
        assert torch.equal(read[rename("big")], source.read("big"))


@pytest.mark.parametrize(
    ("lend", "error", "told"),
    [
        (lambda memory: [("half", memory[:13])], CheckpointError, "has 14 bytes, 13 were asked for"),
        (lambda memory: [("nowhere", memory[:14])], CheckpointError, "has no tensor `nowhere`"),
        (lambda memory: [("half", memory[:14]), ("nan", memory[12:16])], MergeError, "another tensor's too"),
        (lambda _: [("half", bytes(14))], MergeError, "not writable"),
        (lambda memory: [("half", memory[:28:2])], MergeError, "not writable and contiguous"),
    ],
)
def test_memory_that_does_not_do_is_refused(
    folder: Path, lend: Callable[[memoryview], list[tuple[str, object]]], error: type[Exception], told: str
) -> None:
    file = _native.Checkpoint.adapter(str(folder))
    with pytest.raises(error, match=told):
        file.read_all(lend(memoryview(bytearray(64))))
