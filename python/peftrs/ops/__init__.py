"""Operations that methods are made of, and the switch for those that join several into one."""

from __future__ import annotations

import os
from types import TracebackType


class _Switch:
    """What `fused` returns: leaving it as a context sets back what held before."""

    enabled = os.environ.get("PEFTRS_FUSED", "1") != "0"

    def __init__(self, enabled: bool) -> None:
        self.before, _Switch.enabled = _Switch.enabled, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _Switch.enabled = self.before


def fused(enabled: bool) -> _Switch:
    """Turns the fused operations on or off for the process, or as a context for a block: `with
    peftrs.ops.fused(False):`.

    Off, every layer runs the composite of plain torch operations. The environment variable `PEFTRS_FUSED=0`
    starts with them off.
    """
    return _Switch(enabled)


def is_fused() -> bool:
    """Whether fused operations are on."""
    return _Switch.enabled
