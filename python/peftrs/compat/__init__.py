"""peftrs under PEFT's names, for libraries that import `peft`: opt-in, and undone as easily.

`install()` puts a finder on `sys.meta_path` that answers for the modules `peft…` and for the distribution's
version. It touches nothing else, and nothing at all unless called; PEFT itself may be there or not. `python
-m peftrs.compat SCRIPT|-m MODULE ...` runs a program that knows nothing of it.
"""

from __future__ import annotations

import sys
import warnings

from peftrs.compat.finder import Finder
from peftrs.convert.habits import mix_linear
from peftrs.errors import PeftrsError, PeftrsWarning, is_strict, set_strict

_installed: list[tuple[Finder, bool, bool]] = []


def install() -> None:
    """Makes `import peft` give peftrs, from now on in this process; a second call does nothing.

    To be called before transformers, diffusers, accelerate or trl are imported, since they ask once whether
    PEFT is there. Doubtful input (unmatched targets, missing tensors) becomes a warning, as those libraries
    expect, and "linear" of `add_weighted_adapter` adds up factors as PEFT does. Raises `PeftrsError` if PEFT
    itself has been imported.
    """
    if _installed:
        return
    if "peft" in sys.modules:
        raise PeftrsError(
            "`peft` is imported already: call peftrs.compat.install() before anything that imports it"
        )
    late = [
        name for name in ("transformers.trainer", "diffusers", "accelerate", "trl") if name in sys.modules
    ]
    if late:
        warnings.warn(
            f"{', '.join(late)} imported before install() may not see peftrs: call it first", PeftrsWarning, 2
        )
    finder = Finder()
    sys.meta_path.insert(0, finder)
    _installed.append((finder, is_strict(), mix_linear(True)))
    set_strict(False)
    if available := getattr(sys.modules.get("transformers.utils.import_utils"), "is_peft_available", None):
        available.cache_clear()


def uninstall() -> None:
    """Takes the finder and the modules it made away again, and restores what `install()` set."""
    while _installed:
        finder, strict, mixes = _installed.pop()
        sys.meta_path.remove(finder)
        set_strict(strict)
        mix_linear(mixes)
    for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
        if getattr(sys.modules[name], "__peftrs__", False):
            del sys.modules[name]
