"""Loading an adapter's tensors: every name, shape and dtype is checked before the first value is read or
changed.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftrs.bases.sharded import reshard, shape, whole
from peftrs.config import CONFIG_NAME, TargetedConfig
from peftrs.core import merge as merging
from peftrs.core.slots import FittedAdapter
from peftrs.dtype import FLOATS
from peftrs.errors import (
    CheckpointError,
    MismatchError,
    PeftrsWarning,
    Strict,
    complain,
    is_strict,
    joined,
    listed,
    shown,
)
from peftrs.hub import for_hub, local_folder
from peftrs.io.checkpoint import PREFIX, WEIGHTS_NAME, FileSource, Source
from peftrs.io.entries import Entry, device_of, embeddings, entries, plain
from peftrs.io.fingerprint import difference

STRANGERS = 100_000
"""More tensors than this that are not the adapter's are not looked at one by one: the file is another one, or
an attack.
"""


class Incompatible(NamedTuple):
    """What did not fit, as torch's `load_state_dict` tells it: names in memory, and names as the source has
    them.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class LoadReport(Incompatible):
    """The same with what became of every tensor of the source, by the names that it has there."""

    used: list[str]
    """Read under the names that files have for them, or the model."""
    remapped: dict[str, str]
    """Read under another name, which is given: by `key_mapping`, or for a prefix that was missing or too
    much.
    """
    unused: list[str]
    """Not read: unexpected, of another shape, or the same values once more."""


@dataclass
class Match:
    """Which tensor of a source belongs where, and what speaks against loading it."""

    pairs: list[tuple[Entry, str]] = field(default_factory=list)
    missing: list[Entry] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """Names of the model's own weights, which the adapter's config does not speak of."""
    misshapen: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Names given twice, or with dtypes that do not fit."""

    def report(self, source: Source) -> LoadReport:
        """What is told of it when it has been loaded."""
        found = LoadReport([entry.name for entry in self.missing], self.unexpected)
        names = {name: entry.key if name != entry.name else name for entry, name in self.pairs}
        pairs = [(old, new) for name, new in names.items() for old in source.originals(name)]
        found.used = [old for old, new in pairs if old == new]
        found.remapped = {old: new for old, new in pairs if old != new}
        found.unused = [
            old for name in source.described() if name not in names for old in source.originals(name)
        ]
        return found


def load(
    model: nn.Module,
    adapter: str,
    config: TargetedConfig,
    source: Source,
    *,
    strict: Strict,
    report: bool = False,
    ignore_mismatched_sizes: bool = False,
) -> LoadReport:
    """Fills an adapter that the model has from a source, after checking all of it against the model.

    Missing and unexpected tensors are an error (a warning unless `strict`), or with `report` only returned;
    so are values that are no numbers, but for `report`. Slots that still wait for values and find none get
    the method's first ones. Raises `MismatchError` listing every fault, with nothing changed.
    """
    reshard(model)
    match = compare(model, adapter, config, source)
    _judge(
        match, adapter, source, strict=strict, report=report, ignore_mismatched_sizes=ignore_mismatched_sizes
    )
    read, odd = source.read_all([name for _, name in match.pairs])
    if odd:
        text = f"{source.origin}: {len(odd)} tensors hold NaN or infinite values: {listed(odd, 4)}"
        complain(text, CheckpointError, False if report else strict)
    replaced = []
    values: dict[FittedAdapter, dict[str, Tensor]] = {}
    with torch.no_grad():
        for entry, name in match.pairs:
            value = read[name]
            if entry.undeclared and not torch.equal(value.to(before := whole(entry.shown)), before):
                replaced.append(name)
            entry.bind(value)
            if entry.owner is not None:
                values.setdefault(entry.owner, {})[entry.slot] = value
        for fitted in dict.fromkeys(
            entry.owner for entry in match.missing if entry.owner is not None and entry.empty
        ):
            _fill(fitted, values.get(fitted, {}))
    if replaced:
        text = (
            f"{source.origin}: replaces {listed(replaced, 4)} of the model, which adapter {adapter!r} does"
            " not adapt; right where the vocabulary was resized for training, else do not trust the file"
        )
        warnings.warn(text, PeftrsWarning, stacklevel=3)
    return match.report(source)


def opened(
    model: nn.Module, model_id: str | os.PathLike[str], key_mapping: Mapping[str, str] | None, **options: Any
) -> Source:
    """The tensors in an adapter's folder or repository, under the names that `key_mapping` gives.

    Warns where the adapter was made for another model than this one, the user's.
    """
    file = FileSource(local_folder(model_id, [CONFIG_NAME, WEIGHTS_NAME], **for_hub(options)))
    if text := difference(file.notes, model):
        warnings.warn(f"{file.origin}: {text}", PeftrsWarning, stacklevel=4)
    return file.renamed(key_mapping)


def compare(model: nn.Module, adapter: str, config: TargetedConfig, source: Source) -> Match:
    """Which tensors of the source are the adapter's, going by names, shapes and dtypes alone."""
    expected = [*entries(model, adapter, config), *embeddings(model, adapter)]
    # The embeddings' names may be the adapter's already, where it replaces them whole.
    spelled = {name: entry for entry in reversed(expected) for name in (entry.name, entry.key)}
    again = {name for entry in expected for name in entry.again}
    if len(source) > len(expected) + STRANGERS:
        raise MismatchError(
            f"{source.origin}: holds {len(source)} tensors, adapter {adapter!r} has {len(expected)} on this"
            " model"
        )
    own: set[str] | None = None
    match, taken = Match(), set[str]()
    for name, (dtype, size) in source.described().items():
        if not again.isdisjoint(_ways(name)):
            continue
        entry = next((spelled[way] for way in _ways(name) if way in spelled), None)
        if entry is None:
            own = own or {_stripped(plain(name)) for name, _ in model.named_parameters()}
            (match.foreign if _stripped(name) in own else match.unexpected).append(name)
        elif entry.key in taken:
            match.broken.append(f"{shown(name)} is there under two names")
        elif size != shape(entry.shown):
            kind = f"shape {list(size)}" + (", that is no elements" if 0 in size else "")
            match.misshapen.append(f"{shown(name)} has {kind}, the model needs {list(shape(entry.shown))}")
        elif dtype != entry.shown.dtype and not {dtype, entry.shown.dtype} <= FLOATS:
            match.broken.append(f"{shown(name)} is {dtype}, the model needs {entry.shown.dtype}")
        else:
            match.pairs.append((entry, name))
        if entry is not None:
            taken.add(entry.key)
    found = {entry.key for entry, _ in match.pairs}
    match.missing = [entry for entry in expected if entry.required and entry.key not in found]
    match.broken += [
        f"{entry.key} is missing, which nothing stands in for"
        for entry in match.missing
        if entry.vital and entry.empty
    ]
    return match


def _judge(
    match: Match, adapter: str, source: Source, *, strict: Strict, report: bool, ignore_mismatched_sizes: bool
) -> None:
    fatal = [f"{len(match.broken)} do not fit: {joined(match.broken, 2)}"] if match.broken else []
    if match.foreign:
        fatal.append(
            f"{len(match.foreign)} would overwrite weights of the model that the config does not name:"
            f" {listed(match.foreign, 4)}"
        )
    if match.misshapen and not ignore_mismatched_sizes:
        fatal.append(f"{len(match.misshapen)} of another shape: {joined(match.misshapen, 2)}")
    lenient = []
    missing = [entry for entry in match.missing if not (ignore_mismatched_sizes and match.misshapen)]
    if missing and not report:
        lenient.append(f"{len(missing)} missing: {listed([entry.key for entry in missing], 4)}")
    if match.unexpected and not report:
        near = _nearest(match.unexpected[0], match)
        hint = (f" (nearest in the model: {near!r})" if near else "") + _mapping(match)
        lenient.append(f"{len(match.unexpected)} unexpected: {listed(match.unexpected, 4)}{hint}")
    if match.missing and not match.pairs and not report and (strict is not None or is_strict()):
        fatal.append("none of them is used")
    head = f"{source.origin}: the tensors are not those of adapter {adapter!r} on this model"
    if fatal or (lenient and is_strict(strict)):
        raise MismatchError(f"{head}: {'; '.join(fatal + lenient)}")
    if lenient:
        complain(f"{head}: {'; '.join(lenient)}", MismatchError, strict)
    if match.misshapen:
        text = f"{source.origin}: left out for their shape: {', '.join(match.misshapen[:8])}"
        warnings.warn(text, PeftrsWarning, stacklevel=4)


def _fill(fitted: FittedAdapter, given: dict[str, Tensor]) -> None:
    """Gives an adapter that waits for values the method's first ones, and those given where there are any."""
    device = device_of(fitted.frozen)
    base = merging.presented(fitted.frozen, device)
    for slot, parameter in list(fitted.parameters()):
        empty = torch.empty(shape(parameter), dtype=parameter.dtype, device=device)
        fitted[slot] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    fitted.method.init(fitted, base)
    for slot, value in given.items():
        fitted[slot].copy_(value)
    fitted.spread()


def _ways(name: str) -> tuple[str, ...]:
    name = plain(name)
    return name, PREFIX + name, name.removeprefix(PREFIX)


def _stripped(name: str) -> str:
    return plain(name).removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")


def _nearest(name: str, match: Match) -> str | None:
    known = [entry.key for entry in match.missing] or [entry.key for entry, _ in match.pairs]
    found = difflib.get_close_matches(name[:120], known[:2000], n=1, cutoff=0.5)
    return found[0] if found else None


def _mapping(match: Match) -> str:
    """The `key_mapping` that would make unexpected names the missing ones, where a prefix is all that
    differs.
    """
    wanted = {entry.key.removeprefix(PREFIX) for entry in match.missing}
    given = {name.removeprefix(PREFIX) for name in match.unexpected}
    first = min(given)
    for name in wanted:
        for long, short, mapping in ((first, name, "{{'^{}': ''}}"), (name, first, "{{'^': '{}'}}")):
            more = long[: len(long) - len(short)]
            renamed = (
                {one.removeprefix(more) for one in given} if long is first else {more + one for one in given}
            )
            if more.endswith(".") and long == more + short and renamed <= wanted:
                escaped = more.replace(".", chr(92) + ".") if long is first else more
                return f"; hint: key_mapping={mapping.format(escaped)}"
    return ""
