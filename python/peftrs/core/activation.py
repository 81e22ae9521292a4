"""Which adapters act: one shared state a model, which a single layer may override."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import ref

from torch import nn

from peftrs.core.batch import Rows
from peftrs.errors import AdapterError

Table = dict[str, nn.Parameter | None]
"""Where torch keeps the parameters of a module, by name."""


class Stores:
    """Where parameters are: each one's table, and its name in it.

    Two lists, which take least time to go through.
    """

    __slots__ = ("names", "tables")

    def __init__(self) -> None:
        self.tables: list[Table] = []
        self.names: list[str] = []

    def add(self, table: Table, name: str) -> None:
        """Adds the place of one parameter."""
        self.tables.append(table)
        self.names.append(name)

    def require_grad(self, trained: bool) -> None:
        """Sets whether these parameters are trained, those of them that can be."""
        for parameter in list(map(dict.get, self.tables, self.names)):
            if parameter is not None and parameter.requires_grad is not trained:
                parameter.requires_grad = trained and parameter.is_floating_point()


class Acting(NamedTuple):
    """Which adapters act: a new one each time that changes, so that what follows from it is known by its
    identity.
    """

    active: tuple[str, ...] = ()
    enabled: bool = True
    gate: Rows | None = None
    """The adapters of the rows of the call that is running, where every row has its own."""


class Activation:
    """The active adapters, in order, and whether they act. A model's wrapped modules share one: switching is
    one write.

    A copy has none of the modules: those that are copied with it join it themselves, and others stay where
    they are.
    """

    __slots__ = ("acting", "complete", "joined", "merged", "overridden", "stores", "whole")

    def __init__(self, active: Sequence[str] = (), enabled: bool = True, gate: Rows | None = None) -> None:
        self.acting = Acting(tuple(active), enabled, gate)
        self.joined: list[ref[Switched]] = []
        self.whole: list[ref[Switched]] = []
        """Those of them whose adapters have whole modules."""
        self.merged = False
        """Whether adapters may be merged into layers; it stays set until somebody looks."""
        self.overridden: list[Switched] = []
        """The modules that go their own way."""
        self.stores: dict[str, Stores] = {}
        """Where the tensors of each adapter are in all modules together, so far as it was asked for since the
        adapter changed.
        """
        self.complete = False
        """Whether that is so for all adapters."""

    def __reduce__(self) -> Any:
        return Activation, (self.active, self.enabled)

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the adapters that act, in order."""
        return self.acting.active

    @property
    def enabled(self) -> bool:
        """Whether they act."""
        return self.acting.enabled

    @property
    def gate(self) -> Rows | None:
        """The adapters of the rows of the call that is running, where every row has its own."""
        return self.acting.gate

    def switch(self, **changes: Any) -> None:
        """Sets which adapters act: the fields of `Acting` to change."""
        self.acting = self.acting._replace(**changes)

    @property
    def members(self) -> list[Switched]:
        """The modules that share this, in the order in which they came."""
        return [module for held in self.joined if (module := held()) is not None]

    def adapters(self) -> list[str]:
        """The names of all adapters that any of them has, in the order in which they came."""
        names: dict[str, None] = {}
        last: tuple[str, ...] = ()
        for module in self.members:
            if (own := module.adapter_names()) != last:  # layers mostly have the same
                names |= dict.fromkeys(last := own)
        return list(names)

    def leave(self, module: Switched) -> None:
        """Forgets a module that was taken out of the model."""
        self.joined = [held for held in self.joined if held() not in (module, None)]
        self.whole = [held for held in self.whole if held() not in (module, None)]
        self.change()

    def change(self, adapter: str | None = None) -> None:
        """Tells that an adapter's tensors come and go, or any adapter's."""
        self.complete = False
        if adapter is None:
            self.stores.clear()
        else:
            self.stores.pop(adapter, None)

    def require_grad(self, names: Sequence[str], *, only: bool = False, requires_grad: bool = True) -> None:
        """Sets in all modules whether the named adapters are trained; `only` freezes all others."""
        if only and not self.complete:
            self._find(self.adapters())
            self.complete = True
        elif not only:
            self._find(names)
        for name in self.stores if only else names:
            self.stores[name].require_grad(requires_grad and name in names)
        for held in self.whole:
            if (module := held()) is not None:
                module.require_grad(names, only=only, requires_grad=requires_grad)

    def _find(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.stores:
                self.stores[name] = found = Stores()
                for member in self.members:
                    member.store(name, found)

    def clear(self) -> None:
        """Makes every module follow again."""
        for module in self.overridden:
            module.override = None
        self.overridden.clear()


class Switched:
    """A wrapped module whose adapters can be switched: with its model, or alone, as transformers and
    diffusers do.
    """

    activation: Activation
    override: Activation | None = None
    whole = True
    """Whether adapters have whole modules here, whose tensors may become others unseen, and not slots."""

    def join(self, activation: Activation) -> None:
        """Shares this with the other wrapped modules of the model."""
        self.__dict__["activation"] = activation
        held = ref(self, lambda _: activation.change())
        activation.joined.append(held)
        if self.whole:
            activation.whole.append(held)
        activation.merged = activation.merged or self.is_merged()  # of a copy
        activation.change()

    def is_merged(self) -> bool:
        """Whether adapters are in the module's own weights."""
        return False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.join(self.activation)
        if self.override is not None:
            self.activation.overridden.append(self)

    @property
    def state(self) -> Activation:
        """What counts for this module."""
        return self.override or self.activation

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act, in order, whether or not this layer has them."""
        return list(self.state.active)

    @property
    def active_adapter(self) -> list[str]:
        """The same: a list on a layer, even of one."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the module runs as if it had no adapters."""
        return not self.state.enabled

    @abstractmethod
    def adapter_names(self) -> tuple[str, ...]:
        """The adapters that this module has."""

    @abstractmethod
    def tensors(self, adapter: str) -> list[nn.Parameter]:
        """This module's own tensors of an adapter."""

    def store(self, adapter: str, stores: Stores) -> None:
        """Adds where an adapter's slots are, if it has slots here."""

    @abstractmethod
    def require_grad(self, names: Sequence[str], *, only: bool = False, requires_grad: bool = True) -> None:
        """Sets whether the named adapters are trained; `only` freezes all others."""

    @abstractmethod
    def delete_adapter(self, adapter_name: str) -> None:
        """Takes an adapter off this module, which may not have it."""

    def conflict(self, names: Sequence[str]) -> str | None:
        """Why these adapters cannot act on this module together, or None if they can."""
        return None

    def before_switch(self, state: Activation) -> None:
        """Called when this module alone is about to change its active adapters.

        Raises `AdapterError` for a conflict.
        """
        if fault := self.conflict(state.active):
            raise AdapterError(fault)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these the active adapters of this module alone, trainable unless `inference_mode`."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._override(Activation(names, self.state.enabled, self.state.gate))
        self.require_grad(names, only=True, requires_grad=not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Turns the adapters of this module alone on, or off together with their gradients."""
        self._override(Activation(self.state.active, enabled, self.state.gate))
        self.require_grad(self.state.active if enabled else (), only=True)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets whether the named adapters of this module are trained."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.require_grad(names, requires_grad=requires_grad)

    def forget(self, adapter: str) -> None:
        """Drops a deleted adapter from this module's own state; the first one left takes its place if none
        is.
        """
        if self.override is not None:
            active = tuple(name for name in self.override.active if name != adapter)
            self.override.switch(active=active or self.adapter_names()[:1])

    def _override(self, state: Activation) -> None:
        self.before_switch(state)
        if self.override is None:
            self.activation.overridden.append(self)
        self.override = state
