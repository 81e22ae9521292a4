"""PEFT's names of what this version lacks: they can be imported, and say so when they are used."""

from __future__ import annotations

from typing import Any

from peftrs.errors import ConfigError
from peftrs.registry import COMING, MODULES

NAMES = {name: owner for owner, names in COMING.items() for name in names}
"""Every such name, and what it belongs to."""


class Coming(type):
    """The class of the placeholders: nothing is an instance of one, and making one is an error."""

    def __call__(cls, *inputs: Any, **options: Any) -> Any:
        raise ConfigError(
            f"`{cls.__name__}`: {NAMES[cls.__name__]} is not built yet in peftrs; hint: the methods that are:"
            f" {', '.join(MODULES)}"
        )


def __getattr__(name: str) -> type:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    text = f"Stands for {NAMES[name]}, which is not built yet; calling it raises `ConfigError`."
    found = Coming(name, (), {"__doc__": text, "__module__": __name__})
    globals()[name] = found
    return found
