"""How evenly an adapter lies over a model's numbered layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

MANY = 8
"""From how many layers on a list of which half at most are adapted is worth a warning: shorter ones are often
of unlike parts.
"""


@dataclass(frozen=True)
class Coverage:
    """One list of layers, by its name in the model, and how many targets lie in each of them."""

    name: str
    layers: dict[int, int]

    @property
    def adapted(self) -> int:
        """How many layers have any target."""
        return sum(count > 0 for count in self.layers.values())

    @property
    def uneven(self) -> bool:
        """Whether most of many layers are left out."""
        return len(self.layers) >= MANY and 0 < 2 * self.adapted <= len(self.layers)

    def __str__(self) -> str:
        return f"{self.adapted} of {len(self.layers)} layers adapted in {self.name or 'the model'}"


def coverage(modules: Iterable[str], targets: Iterable[str]) -> list[Coverage]:
    """The outermost lists of layers that any target lies in, by the names of all modules and of the
    targets.
    """
    lists: dict[str, dict[int, int]] = {}
    for name in modules:
        owner, _, last = name.rpartition(".")
        if last.isdecimal() and not any(part.isdecimal() for part in owner.split(".")):
            lists.setdefault(owner, {})[int(last)] = 0
    counts = Counter(found for name in targets if (found := _layer(name)) is not None)
    for (owner, number), count in counts.items():
        if number in lists.get(owner, {}):
            lists[owner][number] = count
    return [
        Coverage(name, dict(sorted(layers.items()))) for name, layers in lists.items() if any(layers.values())
    ]


def _layer(name: str) -> tuple[str, int] | None:
    """The outermost list that a module lies in, and its layer there."""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdecimal()), None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]))
