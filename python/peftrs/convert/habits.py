"""Where PEFT does otherwise than peftrs on purpose: habits of its own that a process can ask for.

Imports no torch.
"""

from __future__ import annotations

_habits = {"mix_linear": False}


def mix_linear(mixes: bool) -> bool:
    """Sets whether `add_weighted_adapter`'s "linear" adds up factors as PEFT does; returns what held
    before.
    """
    before, _habits["mix_linear"] = _habits["mix_linear"], mixes
    return before


def mixes_linear() -> bool:
    """Whether "linear" adds up factors."""
    return _habits["mix_linear"]
