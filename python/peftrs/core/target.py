"""What an adapter is to change: the layers that it is for, before they are adapted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peftrs import _native
from peftrs.bases.base import Base
from peftrs.bases.kinds import LayerSpec
from peftrs.bases.parallel import Parallel
from peftrs.core.method import Method
from peftrs.core.tree import Place, original

PROJECTION = 2.0
"""PEFT adds the change of an attention's output projection twice when the attention is a target, in its
forward and in merging. The files of such adapters were trained for that, so that it is what they mean.
"""


@dataclass(frozen=True)
class Target:
    """One layer to adapt."""

    place: Place
    base: Base
    spec: LayerSpec
    method: Method
    values: dict[str, Any] = field(default_factory=dict)
    """The settings of this layer, once they are settled."""
    parallel: Parallel | None = None
    """How the layer lies over processes."""


@dataclass(frozen=True)
class Plan:
    """The layers that an adapter changes, the modules it replaces, each with the one it is tied to, and what
    matched.

    `found` are all modules of the model.
    """

    found: list[Place]
    targets: list[Target]
    saved: list[tuple[Place, str | None]]
    selection: _native.Selection

    def summary(self, adapter: str) -> str:
        """One line for people."""
        kinds = ", ".join(sorted({target.spec.kind.value for target in self.targets}))
        saved = f", {len(self.saved)} modules trained whole" if self.saved else ""
        excluded = f", {len(self.selection.excluded)} excluded" if self.selection.excluded else ""
        return f"adapter {adapter!r}: {len(self.targets)} layers adapted ({kinds}){saved}{excluded}"


def aim(
    place: Place,
    base: Base,
    method: Method,
    matched: dict[str, Any],
    *,
    name: str = "",
    tied: str | None = None,
    strength: float = 1.0,
) -> Target:
    """The target for a place, described by its base.

    `name` is the place's, unless the target is a parameter of it.
    """
    inner = original(place.module)
    biased = base.parameters(inner)[1] is not None
    spec = LayerSpec(
        name or place.name, base.kind, base.shape(inner), biased, base.groups(inner), strength, matched, tied
    )
    return Target(place, base, spec, method)
