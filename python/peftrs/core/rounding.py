"""Judging what rounding to a quantized format again makes of an update.

A merge that would lose most of the update, or drown it in errors, is refused: the same weights in 16 bits
keep it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from peftrs.bases.quantized import IN_A_DTYPE
from peftrs.bases.store import Rounding
from peftrs.errors import MergeError, PeftrsWarning, complain

LEAST, LARGEST = 0.5, 10.0
"""The share of an update that must be left of it, and how many times its size the error may be."""


def judge(found: Sequence[Rounding]) -> None:
    """Tells what rounding did to the updates of a merge.

    Raises `MergeError` (a warning where not strict) if it is lost.
    """
    asked = sum(one.asked for one in found)
    if not asked:
        return
    kept = sum(one.along for one in found) / asked
    noise = (sum(one.missed for one in found) / asked) ** 0.5
    worst = min(found, key=lambda one: one.kept)
    formats = ", ".join(sorted({one.format for one in found}))
    told = (
        f"{len(found)} merged layers are quantized again ({formats}): {kept:.0%} of the update is left, with"
        f" an error of {noise:.0%} of its size; least in {worst.layer}: {worst.kept:.0%}"
    )
    if kept < LEAST or noise > LARGEST:
        complain(f"{told}. That rounds the update away; hint: {IN_A_DTYPE}", MergeError)
    else:
        warnings.warn(told, PeftrsWarning, stacklevel=4)
