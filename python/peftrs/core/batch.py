"""Mixed batches: another adapter, or none, for every row of one call of a model.

A layer runs the rows of each adapter as that adapter alone would, whatever its method. Where all change a
linear layer by factors of low rank, the frozen layer runs once for the whole batch and two batched products
make all the changes, however many adapters there are.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from peftrs.bases.kinds import Term
from peftrs.errors import AdapterError

Through = Callable[[tuple[str, ...], Tensor], Tensor]
"""A layer's output for some rows with the adapters of these names."""

NONE = "__base__"
"""What stands for no adapter where every row of a batch has one."""


class Rows:
    """The adapters of a batch's rows.

    What is given to a layer may hold each row several times in a row: as beams, or as tokens.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.known: dict[Any, tuple[dict[str, Tensor], Tensor]] = {}

    def times(self, x: Tensor, where: str) -> int:
        """How many times `x` holds each row. Raises `AdapterError` if it is not a whole number."""
        times, rest = divmod(len(x), len(self.names))
        if rest or not times:
            raise AdapterError(
                f"{where}: its input has {len(x)} rows, which are not those of {len(self.names)}"
                " `adapter_names`"
            )
        return times

    def groups(self, x: Tensor, held: Container[str], where: str) -> tuple[dict[str, Tensor], Tensor]:
        """The rows of `x` by the adapter that changes them among those held, and where each row is once the
        groups are joined.
        """
        kept = tuple(name if name in held else NONE for name in self.names)
        key = (kept, len(x), x.device)
        if key not in self.known:
            times = self.times(x, where)
            rows: dict[str, list[int]] = {}
            for place in range(len(x)):
                rows.setdefault(kept[place // times], []).append(place)
            groups = {name: torch.tensor(its, device=x.device) for name, its in rows.items()}
            self.known[key] = groups, torch.cat(list(groups.values())).argsort()
        return self.known[key]


def each(
    rows: Rows, held: Container[str], x: Tensor, run: Callable[[str, Tensor], Any], where: str
) -> Tensor:
    """The output of a module that runs the rows of each adapter by themselves."""
    groups, back = rows.groups(x, held, where)
    if len(groups) == 1:
        (name,) = groups
        return cast(Tensor, run(name, x))
    outputs = [run(name, x.index_select(0, its)) for name, its in groups.items()]
    if not all(isinstance(output, Tensor) for output in outputs):
        raise AdapterError(
            f"{where}: gives more than one tensor, so that its rows cannot have adapters of their own"
        )
    return torch.cat(outputs).index_select(0, back)


def at_once(rows: Rows, terms: dict[str, Term], x: Tensor, through: Through, where: str) -> Tensor:
    """The frozen layer's output and, for every row, the change by its adapter's term; none is nothing times
    nothing.
    """
    rows.times(x, where)
    rank = max(term.up.shape[1] for term in terms.values())
    padded = {
        name: (_wide(term.up, rank, 1), _wide(term.down, rank, 0), term.scale) for name, term in terms.items()
    }
    up, down, _ = next(iter(padded.values()))
    padded[NONE] = torch.zeros_like(up), torch.zeros_like(down), 0.0
    ups, downs, scales = zip(*(padded.get(name, padded[NONE]) for name in rows.names), strict=True)
    y = through((), x)
    inner = torch.bmm(x.reshape(len(rows.names), -1, x.shape[-1]).to(down.dtype), torch.stack(downs).mT)
    used = {term.scale for term in terms.values()}
    inner = inner * (used.pop() if len(used) == 1 else inner.new_tensor(scales).view(-1, 1, 1))
    return (y + torch.bmm(inner, torch.stack(ups).mT).view(y.shape)).to(y.dtype)


def _wide(factor: Tensor, rank: int, dimension: int) -> Tensor:
    """A factor with zeros up to this rank, which stands along `dimension`."""
    lacking = rank - factor.shape[dimension]
    return functional.pad(factor, (0, lacking) if dimension else (0, 0, 0, lacking)) if lacking else factor
