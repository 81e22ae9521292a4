"""The exceptions that peftrs raises: one tree under `PeftrsError`, each also a builtin class where that says
it already.
"""

import warnings
from typing import Literal

from peftrs._native import CheckpointError, ConfigError, MergeError, PeftrsError, StorageError, TargetError

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "MergeError",
    "MismatchError",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftWarning",
    "PeftrsError",
    "PeftrsWarning",
    "StorageError",
    "Strict",
    "TargetError",
    "UnfitError",
    "complain",
    "is_strict",
    "listed",
    "set_strict",
    "shown",
]

_strict = True


class AdapterError(PeftrsError, ValueError):
    """An adapter's name is unknown, taken or unfit, or the adapter cannot do what was asked."""


class NoMatchingPeftModuleError(TargetError):
    """Nothing in the model is what an adapter's config names.

    Whoever adds such an adapter on purpose catches this.
    """


class UnfitError(ConfigError, TypeError):
    """A config names modules whose kind it is not for, or a file is no config at all."""


class MismatchError(CheckpointError, RuntimeError):
    """Tensors are not those of the model: a `RuntimeError` too, as torch's `load_state_dict` raises."""


class PeftrsWarning(UserWarning):
    """Something that works but is probably not what was meant."""


PeftError = PeftrsError
"""PEFT's name for the root of all errors."""
PeftWarning = PeftrsWarning
"""PEFT's name for the class of all warnings."""


def set_strict(strict: bool) -> None:
    """Sets whether doubtful input (unmatched targets, missing or unexpected tensors) is an error, the
    default, or a warning.
    """
    global _strict
    _strict = strict


Strict = bool | Literal["warn"] | None
"""Whether doubtful input is an error: True, not but warned of: False or "warn", or as the process has it:
None.
"""


def is_strict(strict: Strict = None) -> bool:
    """Whether doubtful input is an error: as the argument says, or as the process does."""
    return _strict if strict is None else strict is True


def complain(message: str, error: type[PeftrsError], strict: Strict = None) -> None:
    """Raises the error where input is judged strictly, else warns with the same words."""
    if is_strict(strict):
        raise error(message)
    warnings.warn(message, PeftrsWarning, stacklevel=3)


def shown(name: str, limit: int = 120) -> str:
    """The name for an error message, in quotes: what is not printable escaped, and a long one cut."""
    return repr(name if len(name) <= limit else f"{name[: limit - 1]}…")


def joined(faults: list[str], limit: int = 8) -> str:
    """The faults for an error message: all of a few, the first of many and how many more there are."""
    first = "; ".join(faults[:limit])
    return first if len(faults) <= limit else f"{first}; and {len(faults) - limit} more"


def listed(names: list[str], limit: int = 8) -> str:
    """The names for an error message: all of a few, the first of many and how many more there are."""
    first = ", ".join(map(shown, names[:limit]))
    return first if len(names) <= limit else f"{first} and {len(names) - limit} more"
