"""The fold that both forward and merging are: adapters over a frozen layer, the innermost first.

Active adapters `[a, b]`: of two that act on the input, `a` meets it first, being the outermost; of two that
act on the output, `a` acts first, being the innermost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from peftrs.bases.kinds import Affine, Term
from peftrs.core.method import Side
from peftrs.core.slots import FittedAdapter

Chain = tuple[FittedAdapter, ...]


def ordered(adapters: Mapping[str, FittedAdapter], names: Sequence[str]) -> Chain:
    """The adapters of these names that are there, innermost first."""
    if len(names) == 1:
        only = adapters.get(names[0])
        return () if only is None else (only,)
    chain: deque[FittedAdapter] = deque()
    for adapter in (adapters[name] for name in names if name in adapters):
        if adapter.method.side_of(adapter) is Side.INPUT:
            chain.appendleft(adapter)
        else:
            chain.append(adapter)
    return tuple(chain)


def fold(chain: Chain, affine: Affine) -> Affine:
    """The affine map under the chain, innermost first."""
    for adapter in chain:
        affine = adapter.method.apply(adapter, affine)
    return affine


def terms_of(chain: Chain) -> tuple[Term, ...] | None:
    """All that the adapters of a chain are, if each is a `Term`."""
    terms = []
    for adapter in chain:  # torch 2.6 cannot trace this as a generator
        if (term := adapter.method.term(adapter)) is None:
            return None
        terms.append(term)
    return tuple(terms)
