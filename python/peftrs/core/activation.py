"""Which adapters act: one shared state a model, which a single layer may override."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import nn

from peftrs.errors import AdapterError


class Activation:
    """The active adapters, in order, and whether they act. A model's wrapped modules share one: switching is one write."""

    __slots__ = ("active", "enabled", "overridden")

    def __init__(self, active: Sequence[str] = (), enabled: bool = True) -> None:
        self.active = tuple(active)
        self.enabled = enabled
        self.overridden: list[Switched] = []
        """The modules that go their own way."""

    def clear(self) -> None:
        """Makes every module follow again."""
        for module in self.overridden:
            module.override = None
        self.overridden.clear()


class Switched:
    """A wrapped module whose adapters can be switched: with its model, or alone, as transformers and diffusers do."""

    activation: Activation
    override: Activation | None

    @property
    def state(self) -> Activation:
        """What counts for this module."""
        return self.override or self.activation

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act, in order, whether or not this module has them."""
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

    @abstractmethod
    def require_grad(self, names: Sequence[str], *, only: bool = False, requires_grad: bool = True) -> None:
        """Sets whether the named adapters are trained; `only` freezes all others."""

    def conflict(self, names: Sequence[str]) -> str | None:
        """Why these adapters cannot act on this module together, or None if they can."""
        return None

    def before_switch(self, state: Activation) -> None:
        """Called when this module alone is about to change its active adapters. Raises `AdapterError` for a conflict."""
        if fault := self.conflict(state.active):
            raise AdapterError(fault)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these the active adapters of this module alone, trainable unless `inference_mode`."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._override(Activation(names, self.state.enabled))
        self.require_grad(names, only=True, requires_grad=not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Turns the adapters of this module alone on, or off together with their gradients."""
        self._override(Activation(self.state.active, enabled))
        self.require_grad(self.state.active if enabled else (), only=True)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets whether the named adapters of this module are trained."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.require_grad(names, requires_grad=requires_grad)

    def forget(self, adapter: str) -> None:
        """Drops a deleted adapter from this module's own state; the first one left takes its place if none is."""
        if self.override is not None:
            active = tuple(name for name in self.override.active if name != adapter)
            self.override.active = active or self.adapter_names()[:1]

    def _override(self, state: Activation) -> None:
        self.before_switch(state)
        if self.override is None:
            self.activation.overridden.append(self)
        self.override = state
