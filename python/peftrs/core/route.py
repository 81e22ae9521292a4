"""How a layer runs, and why: the only place that decides it.

What changes by our own doing (which adapters act, what is merged, which slots there are) is decided when a
route is made; the layer keeps it until then. What torch may change unseen (parameters and their dtypes,
hooks, modules, what it is doing) is looked at in each call, by `run` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base
from peftrs.bases.dense import Linear
from peftrs.bases.kinds import Affine, LayerKind, Term
from peftrs.core import batch
from peftrs.core.activation import Acting
from peftrs.core.fold import Chain, fold, ordered, terms_of
from peftrs.core.frozen import BENEATH, Frozen
from peftrs.core.slots import FittedAdapter
from peftrs.errors import AdapterError
from peftrs.ops import is_fused, lora_linear
from peftrs.ops.lora_linear import Unstored
from peftrs.torch_private import hooks_of, is_tracing

Run = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""The output of a layer for its inputs by position and by name."""
Table = Mapping[str, nn.Parameter | None]


class Route(NamedTuple):
    """A way for a layer's input to its output."""

    run: Run
    name: str
    """"frozen", "merged", "rows", or where adapters act "fused" with the layer or "composite"."""
    why: str | None = None
    """Why it is composite."""
    ways: Mapping[str, str | None] = MappingProxyType({})
    """By the names of the adapters that act, why each is composite, or None where it is fused."""


class Beneath:
    """What lies beneath an adapter of a chain, for one call of the layer."""

    __slots__ = ("chain", "frozen", "options", "rest", "training")

    def __init__(
        self, frozen: Frozen, chain: Chain, rest: tuple[Any, ...], options: dict[str, Any], training: bool
    ) -> None:
        self.frozen = frozen
        self.chain = chain
        self.rest = rest
        self.options = options
        self.training = training

    @property
    def module(self) -> nn.Module:
        return self.frozen.innermost

    @property
    def base(self) -> Base:
        return self.frozen.base

    def __call__(self, x: Tensor) -> Tensor:
        if not self.chain:
            return self.frozen.call(x, self.rest, self.options)
        if (
            len(self.chain) > 1
            and not (self.rest or self.options)
            and (terms := _runnable(self.chain)) is not None
        ):
            y = _fuse(self.frozen, terms, x, self.training)
            if y is not None:
                return y
        outermost = self.chain[-1]
        below = Beneath(self.frozen, self.chain[:-1], self.rest, self.options, self.training)
        return outermost.method.forward(outermost, x, below)

    def dense(self) -> Affine:
        affine = self.frozen.dense()
        return fold(self.chain, affine) if self.chain else affine

    def obstacle(self) -> str | None:
        if self.chain:
            return "another adapter lies beneath"
        if self.rest or self.options:
            return "the layer beneath takes more than one input"
        return self.frozen.obstacle()

    def fused(self, x: Tensor, term: Term, *, biased: bool = True) -> Tensor | None:
        if self.chain or self.rest or self.options:
            return None
        return _fuse(self.frozen, (term,), x, self.training, biased=biased)

    def op(self, x: Tensor, affine: Affine) -> Tensor:
        frozen = self.frozen
        return cast(Tensor, frozen.base.op(frozen.module, x, affine, self.rest, self.options))


def decide(
    frozen: Frozen, adapters: Mapping[str, FittedAdapter], acting: Acting, settings: Mapping[str, Any]
) -> Route:
    """Decides how a layer runs while these adapters act; `settings` are the attributes of the layer
    itself.
    """
    if acting.enabled and acting.gate is not None:

        def rows(inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
            now = (settings["override"] or settings["activation"]).acting
            return _run_rows(frozen, adapters, now.gate, settings["training"], inputs, options)

        return Route(rows, "rows")
    chain = chain_of(frozen, adapters, acting)

    def slow(inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return _run(frozen, chain, settings["training"], inputs, options)

    if not chain:
        return Route(slow, "frozen" if frozen.ledger is None else "merged")
    ways = _ways(frozen, chain, settings["training"])
    why = next((why for why in ways.values() if why is not None), None)
    terms = None if frozen.base.opaque else _runnable(chain)
    quick = None if terms is None else _quick(frozen, chain, terms, settings, slow)
    return Route(quick or slow, "fused" if why is None else "composite", why, ways)


def traced(
    frozen: Frozen,
    adapters: Mapping[str, FittedAdapter],
    acting: Acting,
    training: bool,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """Runs a layer without deciding anything beforehand, as a compiler reads it."""
    if acting.enabled and acting.gate is not None:
        return _run_rows(frozen, adapters, acting.gate, training, inputs, options)
    return _run(frozen, chain_of(frozen, adapters, acting), training, inputs, options)


def chain_of(frozen: Frozen, adapters: Mapping[str, FittedAdapter], acting: Acting) -> Chain:
    """The adapters that run beside the weights, for all rows."""
    beside = acting.enabled and acting.gate is None and frozen.ledger is None
    return ordered(adapters, acting.active) if beside else ()


def _run(
    frozen: Frozen, chain: Chain, training: bool, inputs: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    if not chain:
        return frozen.module(*inputs, **options)
    if frozen.base.opaque:
        return frozen.base.op(frozen.module, inputs, fold(chain, frozen.dense()), (), options)
    if not inputs:
        inputs = (options.pop(frozen.base.first),)
    return frozen.through(Beneath(frozen, chain, inputs[1:], options, training), inputs[0])


def _run_rows(
    frozen: Frozen,
    adapters: Mapping[str, FittedAdapter],
    rows: batch.Rows,
    training: bool,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    held = {name: adapters[name] for name in rows.names if name in adapters}
    if not held:
        return frozen.module(*inputs, **options)
    if not inputs:
        inputs = (options.pop(frozen.base.first),)
    x, *rest = inputs
    where = frozen.spec.name
    if (rest or options) and any(isinstance(value, Tensor) for value in (*rest, *options.values())):
        raise AdapterError(
            f"{where}: is given more than one tensor, so that rows cannot have adapters of their own"
        )

    def through(names: tuple[str, ...], x: Tensor) -> Tensor:
        return frozen.through(Beneath(frozen, ordered(adapters, names), tuple(rest), options, training), x)

    if (len(held) > 1 or batch.NONE in rows.names) and frozen.spec.kind is LayerKind.LINEAR:
        terms = {name: one.method.term(one) for name, one in held.items()}
        if all(term is not None and term.shift is None for term in terms.values()):
            return batch.at_once(rows, cast("dict[str, Term]", terms), x, through, where)
    return batch.each(rows, held, x, lambda name, its: through((name,), its), where)


def _runnable(chain: Chain) -> tuple[Term, ...] | None:
    """The terms of a chain, if its adapters are nothing else and run as such."""
    for adapter in chain:  # torch 2.6 cannot trace this as a generator
        if adapter.method.fused_term(adapter) is None:
            return None
    return terms_of(chain)


def _ways(frozen: Frozen, chain: Chain, training: bool) -> dict[str, str | None]:
    """Why each adapter of a chain does not run as one operation with the layer beneath, or None where it
    does.
    """
    terms = _runnable(chain)
    if terms is not None and _why_apart(frozen, terms, training) is None:
        return {adapter.name: None for adapter in chain}
    ways = {chain[0].name: _why_alone(frozen, chain[0], training)}
    return ways | {adapter.name: "another adapter lies beneath" for adapter in chain[1:]}


def _why_alone(frozen: Frozen, adapter: FittedAdapter, training: bool) -> str | None:
    term = adapter.method.fused_term(adapter)
    if term is None:
        return f"{adapter.method.name} has no fused form"
    return _why_apart(frozen, (term,), training)


def _why_apart(frozen: Frozen, terms: Sequence[Term], training: bool) -> str | None:
    """Why these terms do not run as one operation with the layer beneath whatever the input, or None if they
    do.
    """
    if (fault := _barrier(frozen, terms, training)) is not None:
        return fault
    up, down, dropout = terms[0].up, terms[0].down, terms[0].dropout if training else 0.0
    return lora_linear.unfit(frozen.factor(down.dtype)[0], down, up, dropout)


def _barrier(frozen: Frozen, terms: Sequence[Term], training: bool) -> str | None:
    if frozen.spec.kind is not LayerKind.LINEAR:
        return "its kind of layer has no fused form"
    for term in terms:
        if isinstance(term.scale, Tensor):
            return "its strength is a tensor, so that it can change under compiled code"
        if term.dropout and training and term.exempt:
            return "dropout does not act on the factors that its start took out of the weight"
        if term.dropout and training and len(terms) > 1:
            return "with dropout, each adapter draws a mask of its own"
        if term.down.dtype != terms[0].down.dtype:
            return "their dtypes differ"
    return frozen.obstacle()


def _fuse(
    frozen: Frozen, terms: Sequence[Term], x: Tensor, training: bool, *, biased: bool = True
) -> Tensor | None:
    """The output with the terms as one operation with the layer beneath, or None where that does not go.

    Several are one adapter of the sum of their ranks: two LoRAs (r=16 and r=8, 256 tokens, 576 to 1536 and
    back, forward and backward, CPU) take 0.87 to 0.91 of the time of one over the other.
    """
    if _barrier(frozen, terms, training) is not None:
        return None
    weight, bias = frozen.factor(x.dtype)
    computed = isinstance(weight, Unstored)
    if (
        computed
        and torch.is_autocast_enabled(x.device.type)
        and weight.dtype != torch.get_autocast_dtype(x.device.type)
    ):
        return None  # the library would take its product in the dtype of its own
    if not biased:
        bias = None
    for term in terms:
        if term.shift is not None:
            bias = term.scale * term.shift if bias is None else bias + term.scale * term.shift
    if len(terms) == 1:
        factors = _factors(terms[0], training)
    else:
        factors = lora_linear.joined([_factors(term, training) for term in terms])
    y = lora_linear.lora_linear(x, weight, bias, *factors)
    return y.to(x.dtype) if computed and y is not None else y


def _factors(term: Term, training: bool) -> lora_linear.Factors:
    return lora_linear.Factors(term.down, term.up, cast(float, term.scale), term.dropout if training else 0.0)


_Held = tuple[Mapping[str, nn.Module | None], nn.Module, Table, str]
"""Where a slot's parameter is: the modules of its container, the adapter's one of them, its parameters, and
the name there.
"""


def _held(adapter: FittedAdapter, tensor: Tensor) -> _Held | None:
    """Where the slot is that this tensor is itself, or None if it is made of slots."""
    for slot, (container, leaf) in adapter.places.items():
        if leaf and adapter.raw(slot) is tensor:
            module, _ = adapter.holder(slot)
            return adapter.frozen.modules[container]._modules, module, module._parameters, leaf
    return None


def _quick(
    frozen: Frozen, chain: Chain, terms: Sequence[Term], settings: Mapping[str, Any], slow: Run
) -> Run | None:
    """The way of few steps for terms that are slots themselves over an `nn.Linear`, or None for others.

    With small inputs, looking things up costs more than computing. Whatever is out of the ordinary goes the
    slow way.
    """
    module = frozen.module
    if type(frozen.base) is not Linear or frozen.parallel is not None or frozen.obstacle() is not None:
        return None
    several = []
    for adapter, term in zip(chain, terms, strict=True):
        lower, upper = _held(adapter, term.down), _held(adapter, term.up)
        if lower is None or upper is None or term.shift is not None or term.exempt:
            return None
        several.append((adapter, adapter.name, *lower, *upper, term.dropout))
    modules, kind, own, hooks = frozen.modules, type(module), module.__dict__, hooks_of(module)
    stored: Table = module._parameters
    reach = 1 + frozen.spec.out_features / frozen.spec.in_features

    def quick(inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options or len(inputs) != 1 or type(inputs[0]) is not Tensor or not is_fused():
            return slow(inputs, options)
        if any(hooks) or "forward" in own or type(module) is not kind:
            return slow(inputs, options)
        x, bias = inputs[0], stored.get("bias")
        weight: Any = stored.get("weight")
        dtype, wide = x.dtype, None
        factors: list[tuple[Tensor, Tensor, float, float]] = []
        for adapter, name, lowers, lower, downs, low, uppers, upper, ups, high, dropout in several:
            if (
                lowers.get(name) is not lower
                or uppers.get(name) is not upper
                or modules[BENEATH] is not module
            ):
                frozen.changed()  # decided anew for the modules that are there now
                return slow(inputs, options)
            down, up, scaling = downs.get(low), ups.get(high), adapter.scaling
            if not (type(down) is type(up) is type(weight) is nn.Parameter and type(scaling) is float):
                return slow(inputs, options)
            if wide is None:
                wide = down.dtype
            if down.is_meta or (factors and down.dtype is not wide):
                return slow(inputs, options)
            factors.append((down, up, scaling, dropout if settings["training"] else 0.0))
        if weight.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
            return slow(inputs, options)
        if wide is not dtype and (wide is not torch.float32 or dtype not in lora_linear.NARROW):
            return slow(inputs, options)
        if (
            x.numel() * reach <= lora_linear.SMALL
            and x.is_cpu
            and not is_tracing()
            and not torch.is_autocast_enabled("cpu")
        ):
            return lora_linear.composed(x, weight, bias, factors)
        if len(factors) > 1 and any(dropout for *_, dropout in factors):
            return slow(inputs, options)  # each draws a mask of its own
        joined = lora_linear.joined(factors) if len(factors) > 1 else factors[0]
        y = lora_linear.lora_linear(x, weight, bias, *joined)
        return slow(inputs, options) if y is None else y

    return quick
