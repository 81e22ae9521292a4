"""One layer that an adapter is for, before it is adapted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peftrs.bases.base import Base
from peftrs.bases.kinds import LayerSpec
from peftrs.bases.parallel import Parallel
from peftrs.core.method import Method
from peftrs.core.tree import Place, original


@dataclass(frozen=True)
class Target:
    """One layer to adapt; `tied` names the target whose tensors it shares."""

    place: Place
    base: Base
    spec: LayerSpec
    method: Method
    tied: str | None = None
    parallel: Parallel | None = None
    """How the layer lies over processes."""


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
        name or place.name, base.kind, base.shape(inner), biased, base.groups(inner), strength, matched
    )
    return Target(place, base, spec, method, tied)
