"""Tensors to and from safetensors files, without a copy in between: the Rust core fills and reads torch's
memory.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from peftrs import _native
from peftrs.config import CONFIG_NAME
from peftrs.dtype import DTYPES, NAMES, SAVED
from peftrs.errors import AdapterError, CheckpointError, shown
from peftrs.hub import for_hub, local_folder

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""How the names of tensors begin in files: the path from `PeftModel` to the user's model."""


class Source(Protocol):
    """Where tensors come from: what there is can be asked before any of it is read."""

    origin: str
    """What messages call it."""

    def __len__(self) -> int:
        """How many tensors there are, at no cost."""

    def described(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtype and shape of every tensor by name."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU or where it lies."""

    def originals(self, name: str) -> tuple[str, ...]:
        """What the tensor, or those that it is made of, are called where they really come from."""

    def read_all(self, names: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
        """These tensors by name, and the names of those that hold NaN or infinite values."""


class FileSource:
    """The weights in an adapter's folder, or with `model` a model's.

    Opening it checks all headers; see `_native.Checkpoint`.
    """

    def __init__(self, folder: str, *, model: bool = False) -> None:
        self.origin = folder if model else os.path.join(folder, WEIGHTS_NAME)
        self._file = (
            _native.Checkpoint.model(folder, follow_links=True)
            if model
            else _native.Checkpoint.adapter(folder)
        )
        self.notes = self._file.metadata()
        self._described: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self._file.entries())

    def described(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        if not self._described:
            rows = self._file.entries()
            unknown = [f"{shown(name)} is {dtype}" for name, dtype, _ in rows if dtype not in DTYPES]
            if unknown:
                raise CheckpointError(
                    f"{self.origin}: holds tensors of a type that adapters do not have:"
                    f" {', '.join(unknown[:8])}"
                )
            self._described = {name: (DTYPES[dtype], tuple(shape)) for name, dtype, shape in rows}
        return self._described

    def renamed(self, key_mapping: Mapping[str, str] | None) -> Source:
        """The same under the names that the patterns of `key_mapping` give, if any; see `Renamed`."""
        return Renamed(self, key_mapping) if key_mapping else self

    def originals(self, name: str) -> tuple[str, ...]:
        return (name,)

    def kinds(self) -> dict[str, str]:
        """What each layer seems to be, by its name and the shape of its weight."""
        return dict(self._file.layers())

    def read(self, name: str) -> Tensor:
        dtype, shape = self.described()[name]
        data = self._file.read(name)
        # The tensor keeps the bytearray alive.
        return (
            torch.frombuffer(data, dtype=dtype).view(shape) if len(data) else torch.empty(shape, dtype=dtype)
        )

    def read_all(self, names: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
        described = self.described()
        read = {name: torch.empty(shape, dtype=dtype) for name in names for dtype, shape in [described[name]]}
        finite = self._file.read_all([(name, _memory(tensor)) for name, tensor in read.items()])
        return read, [name for name, whole in zip(read, finite, strict=True) if not whole]


class MemorySource:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        self.origin = origin
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def described(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def originals(self, name: str) -> tuple[str, ...]:
        return (name,)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def read_all(self, names: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
        read = {name: self.read(name) for name in names}
        return read, [name for name, value in read.items() if not is_finite(value)]


class Renamed:
    """Another source under other names, which `key_mapping` gives: patterns to replacements, the first that
    matches counts.

    The patterns see names without the prefix of files. Raises `CheckpointError` for names without it, or that
    become equal.
    """

    def __init__(self, source: Source, key_mapping: Mapping[str, str]) -> None:
        self.origin = source.origin
        self._source = source
        self._key_mapping = key_mapping
        self._names: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._source)

    def described(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        described = self._source.described()
        self._names = {}
        for name in described:
            prefix = next((prefix for prefix in (PREFIX, "base_model.") if name.startswith(prefix)), None)
            if prefix is None:
                raise CheckpointError(
                    f"{self.origin}: `key_mapping` needs names that begin with {PREFIX!r}, unlike"
                    f" {shown(name)}"
                )
            new = _renamed(name.removeprefix(prefix), self._key_mapping)
            if prefix + new in self._names:
                raise CheckpointError(
                    f"{self.origin}: `key_mapping` gives two tensors the name {shown(prefix + new)}"
                )
            self._names[prefix + new] = name
        return {new: described[old] for new, old in self._names.items()}

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])

    def originals(self, name: str) -> tuple[str, ...]:
        return self._source.originals(self._names[name])

    def read_all(self, names: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
        read, odd = self._source.read_all([self._names[name] for name in names])
        given = {old: new for new, old in self._names.items()}
        return {given[old]: value for old, value in read.items()}, [given[old] for old in odd]


def is_finite(value: Tensor) -> bool:
    """Whether all values are numbers.

    The smallest and the largest are found far faster than each value is looked at.
    """
    if not value.is_floating_point() or not value.numel():
        return True
    least, most = torch.aminmax(value)
    return isfinite(least.item()) and isfinite(most.item())


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which the caller keeps alive."""
    if not tensor.nbytes:
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _renamed(name: str, key_mapping: Mapping[str, str]) -> str:
    for pattern, replacement in key_mapping.items():
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter in a local folder or repository, by name, on `device` (default: the CPU).

    Raises `CheckpointError` for a file that breaks the format, or is missing; pickled weights are never read.
    """
    source = FileSource(local_folder(model_id, [CONFIG_NAME, WEIGHTS_NAME], **for_hub(hub))).renamed(
        key_mapping
    )
    return {name: source.read(name).to(device) for name in source.described()}


def write(
    folder: str | os.PathLike[str],
    config: str,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes],
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes an adapter's config, weights and further files into a folder, all or nothing, synced to the
    disk.

    `notes` go into the metadata of the weights' file.
    """
    rows, held = [], []
    for name, tensor in tensors.items():
        if tensor.dtype not in SAVED:
            raise AdapterError(
                f"{name}: cannot save a tensor of {tensor.dtype}, which adapters' files do not hold"
            )
        if tensor.device.type == "meta":
            raise AdapterError(
                f"{name}: cannot save a tensor without values; hint: gather sharded parameters first and pass"
                " them as `state_dict`"
            )
        plain = tensor.detach().cpu().contiguous()
        held.append(plain)
        rows.append((name, NAMES[plain.dtype], list(plain.shape), _memory(plain)))
    _native.write_adapter(os.fspath(folder), config, rows, files=files, notes=notes)
