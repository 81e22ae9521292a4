"""The layer beneath all adapters of one adapted layer, as the fold, merging and the routes work on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base
from peftrs.bases.kinds import Affine, LayerSpec
from peftrs.bases.offload import device_of, onloaded
from peftrs.bases.parallel import Parallel
from peftrs.bases.quantized import Quantized
from peftrs.bases.sharded import gathered, in_parts, whole
from peftrs.bases.store import Undo
from peftrs.ops.lora_linear import Unstored

BENEATH = "base_layer"
"""The name under which an adapted layer holds the frozen one."""


class Original(nn.Module):
    """A weight or bias that several modules hold, kept as it was while those of them that are merged have
    their own.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter


@dataclass(frozen=True)
class Shared:
    """Where a layer to be merged holds a weight or bias that other modules hold too."""

    owner: nn.Module
    attribute: str
    original: Original
    at: int
    """Its position in `Base.stored`."""


@dataclass(frozen=True)
class Ledger:
    """What is merged: the names, in the order in which they are active, and what takes them out again.

    `undo` is None after a merge for good.
    """

    names: tuple[str, ...]
    undo: Undo | None
    shared: tuple[Shared, ...] = ()

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        return 0 if self.undo is None else self.undo.bytes


class Frozen:
    """A frozen layer: where it hangs, what kind it is, how it lies over processes, and what is merged into
    it.
    """

    def __init__(
        self, modules: dict[str, nn.Module], base: Base, spec: LayerSpec, parallel: Parallel | None = None
    ) -> None:
        self.modules = modules
        """The table of modules that holds it, so that whoever puts another module there is followed."""
        self.base = base
        self.spec = spec
        self.parallel = parallel
        self.ledger: Ledger | None = None
        """What is merged into the weights, or None."""
        self.routes: dict[Any, Any] = {}
        """How the layer runs, by which adapters act: what `core.route` decided since anything of the layer
        changed.
        """
        self.routed: tuple[Any, Any] = (None, None)
        """Which adapters acted in the last call, and its route."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"routes": {}, "routed": (None, None)}  # a copy decides by itself

    def on(self, modules: dict[str, nn.Module]) -> Frozen:
        """The same on a replica of the layer, which holds its modules in another table."""
        twin = Frozen(modules, self.base, self.spec, self.parallel)
        twin.ledger = self.ledger
        return twin

    @property
    def module(self) -> nn.Module:
        """The module itself: the frozen layer, or one adapted beneath this one."""
        return self.modules[BENEATH]

    @module.setter
    def module(self, module: nn.Module) -> None:
        self.modules[BENEATH] = module

    @property
    def innermost(self) -> nn.Module:
        """The frozen layer below all that are adapted around it."""
        module = self.module
        while (frozen := module.__dict__.get("frozen")) is not None and isinstance(frozen, Frozen):
            module = frozen.module
        return module

    def changed(self) -> None:
        """Forgets how the layer runs, since something that decides it has changed."""
        self.routes.clear()
        self.routed = None, None

    def record(self, ledger: Ledger | None) -> None:
        """Sets what is merged."""
        self.ledger = ledger
        self.changed()

    @property
    def device(self) -> torch.device:
        """Where the layer computes, and its adapters belong."""
        return device_of(self.module, self.weight)

    @property
    def weight(self) -> nn.Parameter:
        """The weight as it is stored: of device meta while it is kept elsewhere, a part where it lies over
        processes.
        """
        return self.base.parameters(self.module)[0]

    @property
    def stored(self) -> list[nn.Parameter]:
        """The layer's own weight and, if it has one, bias, as they are stored."""
        return self.base.stored(self.module)

    def dense(self) -> Affine:
        """The layer as an affine map, to be read: whole, or as a whole that lies over processes as the layer
        does.
        """
        affine = self.base.dense(self.modules[BENEATH])
        if self.parallel is not None or not in_parts(affine.weight):
            return affine
        return Affine(whole(affine.weight), None if affine.bias is None else whole(affine.bias))

    def factor(self, dtype: torch.dtype) -> tuple[Tensor | Unstored, Tensor | None]:
        """As `dense`, but a quantized weight is yet to be computed, in the dtype in which an input of `dtype`
        is taken.
        """
        if not self.base.quantized:  # a flag: abstract classes take long to tell instances
            return self.dense()
        base, module = cast(Quantized, self.base), self.module
        stored, bias = base.parameters(module)
        computed = base.computes_in(module, dtype)

        def compute() -> Tensor:
            # With gradients on, someone differentiates the gradients, and keeps the weight for that.
            reused = not torch.is_grad_enabled()
            with torch.no_grad():
                return base.multiplied(module, computed, reused=reused)

        return Unstored(compute, torch.Size(base.shape(module)), computed, stored.device, base.rounds), bias

    def obstacle(self) -> str | None:
        """Why calling the layer does more than apply its affine map to one input, or None if that is all."""
        return self.base.obstacle(self.modules[BENEATH])

    def call(self, x: Tensor, rest: tuple[Any, ...] = (), options: dict[str, Any] | None = None) -> Tensor:
        """The layer's own output for `x`, as one tensor of all processes."""
        y = cast(Tensor, self.modules[BENEATH](x, *rest, **(options or {})))
        return y if self.parallel is None else self.parallel.joined(y)

    def through(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The output of `run` for `x`, taken and given as the layer lies over processes, where it does."""
        return run(x) if self.parallel is None else self.parallel.leave(run(self.parallel.enter(x)))

    @contextmanager
    def at_hand(self, *, write: bool = False) -> Iterator[None]:
        """Brings in weights that are kept elsewhere inside the `with`; with `write` what is put into them is
        kept.
        """
        held = (parameter for module in self.modules.values() for parameter in module.parameters())
        with onloaded(self.module, write=write), gathered(held, write=write):
            yield
