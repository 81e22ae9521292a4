"""The Rust core as Python sees it: files in and out, module names to targets, arithmetic on weights in
place.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import final

__version__: str

class PeftrsError(Exception):
    """The root of every error that peftrs raises; its message names what is at fault and the way out."""

class ConfigError(PeftrsError, ValueError):
    """An adapter config is malformed, or asks for what cannot be."""

class CheckpointError(PeftrsError, ValueError):
    """A checkpoint's bytes break the format, or its tensors are not those that were expected."""

class TargetError(PeftrsError, ValueError):
    """A pattern is malformed, too costly, or matched nothing."""

class MergeError(PeftrsError, ValueError):
    """A merge was refused or failed."""

class StorageError(PeftrsError, OSError):
    """The operating system refused to read or write a file or folder."""

@final
class Checkpoint:
    """An open safetensors checkpoint whose headers have all been checked; tensor bytes are read on
    request.
    """

    @staticmethod
    def adapter(folder: str, *, follow_links: bool = False) -> Checkpoint:
        """Opens `adapter_model.safetensors` in `folder`. Raises `CheckpointError` or `StorageError`."""
    @staticmethod
    def model(path: str, *, follow_links: bool = False) -> Checkpoint:
        """Opens a model folder (one file, or shards with an index) or one safetensors file."""
    def entries(self) -> Sequence[tuple[str, str, tuple[int, ...]]]:
        """Every tensor as (name, dtype as safetensors spells it, shape), in the order of the file, each made
        when asked for.
        """
    def layers(self) -> list[tuple[str, str]]:
        """Every layer, or bare parameter, and its kind as its name and shape suggest (`linear`, `embedding`,
        `conv1d`, `other`).
        """
    def metadata(self) -> dict[str, str]:
        """The header's `__metadata__` (that of the first file of a sharded checkpoint)."""
    def read(self, name: str) -> bytearray:
        """The bytes of one tensor, little-endian and row-major.

        Raises `CheckpointError` if there is none of that name.
        """
    def read_all(self, tensors: Sequence[tuple[str, object]]) -> list[bool]:
        """Fills writable buffers, each with the tensor of its name, on all threads; whether the values of
        each are finite.

        Raises `CheckpointError` for a name that is not there or a buffer of another length.
        """

def read_config(folder: str) -> tuple[str, list[str]]:
    """The text of `adapter_config.json` in `folder`, checked to be one JSON object, and warnings (duplicate
    keys).

    Raises `CheckpointError` (missing, too large, too deep, not JSON) or `StorageError`.
    """

def check_config(text: str, origin: str) -> list[str]:
    """Checks the types and limits of an adapter config's fields; returns warnings, raises `ConfigError`
    listing all faults.
    """

def write_adapter(
    folder: str,
    config: str,
    tensors: Sequence[tuple[str, str, Sequence[int], object]],
    *,
    files: Mapping[str, bytes] | None = None,
    notes: Mapping[str, str] | None = None,
    sync: bool = True,
) -> None:
    """Writes `adapter_config.json`, `adapter_model.safetensors` and `files` into `folder`, all or nothing.

    Each tensor is (name, dtype as safetensors spells it, shape, object with the buffer protocol over its
    contiguous bytes). `notes` go into the metadata of the tensors' file. The folder is made if missing; other
    files in it are left alone. `sync` flushes to the disk before the names appear.
    """

def write_config(folder: str, config: str) -> None:
    """Writes `adapter_config.json` into `folder`, made if missing, atomically and synced."""

@final
class Selection:
    """What a config's patterns select, and a report of what each entry matched."""

    @property
    def targets(self) -> list[str]:
        """Names of the modules to adapt, in the order given."""
    @property
    def parameters(self) -> list[str]:
        """Full names (`<module>.<parameter>`) of the bare parameters to adapt, in the order given."""
    @property
    def modules_to_save(self) -> list[str]:
        """Names of the modules to train and save whole."""
    @property
    def excluded(self) -> list[str]:
        """Names that `exclude_modules` took out."""
    @property
    def feedforward(self) -> list[bool]:
        """For each target, whether `feedforward_modules` names it."""
    def pattern_index(self, field: str) -> list[int]:
        """For each target, then for each parameter, the index of the first key of `field` that matches it, or
        -1.
        """
    @property
    def report(self) -> list[tuple[str, str, int, str | None]]:
        """One row per entry: (field, entry, how many names it matched, the nearest module name if none)."""

def select(
    modules: Sequence[str],
    *,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    linear: Sequence[str] = (),
    layers_to_transform: Sequence[int] | None = None,
    layers_pattern: Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    feedforward_modules: str | Sequence[str] | None = None,
    parameters: Sequence[str] = (),
    target_parameters: Sequence[str] | None = None,
    patterns: Mapping[str, Sequence[str]] | None = None,
) -> Selection:
    """Applies PEFT's targeting rules to all module names in one call.

    `linear` are the names that "all-linear" stands for. `patterns` are fields whose keys are looked up per
    target (`rank_pattern`, `alpha_pattern`). Raises `TargetError` for a pattern that is malformed or too
    costly.
    """

def shortest_suffixes(targets: Sequence[str], others: Sequence[str]) -> list[str]:
    """The smallest sorted list of dotted suffixes that match every name of `targets` and none of `others`."""

def parse_keys(keys: Sequence[str], slots: Sequence[str]) -> list[tuple[str, str] | None]:
    """For each checkpoint key, its (module path, slot) if it ends in one of `slots`, the `base_model.model.`
    prefix removed.
    """

_Matrix = tuple[int, str, tuple[int, int], tuple[int, int]]
"""A matrix in memory: address, dtype as safetensors spells it, rows and columns, and strides in elements.

The memory must be live for the call, and nobody else may write to it."""
_Update = tuple[_Matrix, _Matrix, float, int]
"""`scaling * up @ down` as (up, down, scaling, how many threads at most); factors may be of type F64, F32,
F16 or BF16.
"""

def add_low_rank(weight: _Matrix, update: _Update, keep: bool) -> tuple[bool, bytes | None]:
    """weight += scaling * up @ down, in place, rounded once; the interpreter is released while it runs.

    `weight` is contiguous, of type F16, BF16 or F32. Returns whether all weights are finite then, and with
    `keep` what `restore_low_rank` needs beside the factors.
    """

def correct_low_rank(original: _Matrix, merged: _Matrix, update: _Update) -> bytes:
    """What `restore_low_rank` needs to make `original` from `merged`, to which other arithmetic added the
    update.
    """

def restore_low_rank(weight: _Matrix, update: _Update, correction: bytes) -> bool:
    """Makes a merged weight what it was, in place; returns whether it is that to the bit.

    It is not where the weight was changed since it was merged: there, the update is subtracted. Raises
    `MergeError` for a correction that is damaged.
    """

def largest_magnitude(matrix: _Matrix) -> float:
    """The largest magnitude in a matrix of type F64, F32, F16 or BF16: infinite if a value is not finite, 0
    if there is none.
    """

def tool_main(
    arguments: Sequence[str],
    by_class: Callable[
        [PathLike[str], str | None],
        tuple[list[str], list[tuple[str, str, list[int], int]], list[str], list[str]],
    ],
    extract: Callable[[str], str],
    memory: Callable[[str], str] | None = None,
) -> int:
    """Runs the `peftrs` tool and returns its exit code.

    `by_class` is asked, with a model's path and an adapter's `task_type`, for what only the model's class
    knows: the names of all modules, the layers as (name, kind, shape of the weight as stored, parameters),
    the full names of all parameters, and the layers that "all-linear" stands for. `extract` makes an adapter:
    the request and the report are JSON. The message of what either raises is the tool's error.
    """

def merge_main(arguments: Sequence[str]) -> int:
    """Runs the `peftrs-merge` tool and returns its exit code."""
