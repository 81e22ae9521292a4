"""The console scripts."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from os import PathLike
from typing import TYPE_CHECKING

from peftrs._native import PeftrsError, merge_main, tool_main

if TYPE_CHECKING:
    from peftrs.planning.outline import Outline

LACKING = "hint: pip install peftrs[transformers]"


def merge() -> int:
    """Runs `peftrs-merge` on the command line's arguments and returns its exit code."""
    return merge_main(sys.argv[1:])


def tool() -> int:
    """Runs `peftrs` on the command line's arguments and returns its exit code."""
    # Nothing that an interruption could leave behind has its name yet.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return tool_main(sys.argv[1:], _by_class, _extract, _memory)


def _by_class(model: PathLike[str], task: str | None) -> Outline:
    try:
        from peftrs.planning import outline

        return outline.by_class(model, task)
    except ImportError as error:
        raise PeftrsError(f"{error}: only the model's class says which layers it has; {LACKING}") from None


def _extract(request: str) -> str:
    try:
        from peftrs.convert.extract import extract
    except ImportError as error:
        raise PeftrsError(f"{error}: extracting takes torch; {LACKING}") from None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = extract(**json.loads(request))
    return json.dumps(found.to_dict() | {"warnings": [str(one.message) for one in told]})


def _memory(request: str) -> str:
    try:
        from peftrs.train.memory import plan

        return json.dumps(plan(**json.loads(request)))
    except ImportError as error:
        raise PeftrsError(
            f"{error}: telling what training takes needs torch and the model's class; {LACKING}"
        ) from None
