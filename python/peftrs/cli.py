"""The console scripts."""

from __future__ import annotations

import signal
import sys
from os import PathLike
from typing import TYPE_CHECKING

from peftrs._native import PeftrsError, merge_main, tool_main

if TYPE_CHECKING:
    from peftrs.model.outline import Outline


def merge() -> int:
    """Runs `peftrs-merge` on the command line's arguments and returns its exit code."""
    return merge_main(sys.argv[1:])


def tool() -> int:
    """Runs `peftrs` on the command line's arguments and returns its exit code."""
    # It writes nothing that an interruption could leave behind.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return tool_main(sys.argv[1:], _by_class)


def _by_class(model: PathLike[str], task: str | None) -> Outline:
    try:
        from peftrs.model import outline

        return outline.by_class(model, task)
    except ImportError as error:
        message = f"{error}: only the model's class says which layers it has; hint: pip install peftrs[transformers]"
        raise PeftrsError(message) from None
