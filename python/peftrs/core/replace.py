"""Modules that an adapter replaces whole: trained copies beside the frozen original (`modules_to_save`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from peftrs.bases import offload
from peftrs.core import batch
from peftrs.core.activation import Activation, Switched
from peftrs.errors import AdapterError


class ReplacedModule(Switched, nn.Module):
    """A module with one trained copy per adapter. The copy of the active adapter runs, else the original."""

    adapter_layer_names = ("modules_to_save",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, original_module: nn.Module, activation: Activation, name: str) -> None:
        super().__init__()
        self.training = original_module.training
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.join(activation)
        self.name = name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.current(), name)

    def add(self, adapter: str, tied: nn.Module | None = None) -> nn.Module:
        """Makes the adapter's copy, sharing the weight of `tied` where that is given; trainable."""
        module = offload.copied(self.original_module)
        module.requires_grad_(True)
        if tied is not None:
            module.weight = cast(nn.Parameter, tied.weight)
        self.modules_to_save[adapter] = module
        return module

    def current(self) -> nn.Module:
        """The module that runs now."""
        state = self.state
        if state.enabled:
            for name in state.active:
                if name in self.modules_to_save:
                    return self.modules_to_save[name]
        return self.original_module

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act and have a copy here, in order."""
        return [name for name in self.state.active if name in self.modules_to_save]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        rows = self.state.gate
        if rows is None or not self.state.enabled:
            return self.current()(*inputs, **options)
        copies = dict(self.modules_to_save.items())
        if copies.keys().isdisjoint(rows.names):
            return self.original_module(*inputs, **options)
        given: dict[Any, Any] = {**dict(enumerate(inputs)), **options}
        tensors = [key for key, value in given.items() if isinstance(value, Tensor)]
        if len(tensors) != 1:
            raise AdapterError(
                f"{self.name}: is given {len(tensors)} tensors and not one, so that rows cannot have"
                " modules of their own"
            )

        def run(name: str, its: Tensor) -> Any:
            now = given | {tensors[0]: its}
            by_position = [now.pop(place) for place in range(len(inputs))]
            return copies.get(name, self.original_module)(*by_position, **now)

        return batch.each(rows, copies, given[tensors[0]], run, self.name)

    def conflict(self, names: Sequence[str]) -> str | None:
        held = [name for name in names if name in self.modules_to_save]
        return (
            f"{self.name}: {held} each replace this module; only one of them can be active"
            if len(held) > 1
            else None
        )

    def adapter_names(self) -> tuple[str, ...]:
        return tuple(self.modules_to_save)

    def tensors(self, adapter: str) -> list[nn.Parameter]:
        return list(self.modules_to_save[adapter].parameters()) if adapter in self.modules_to_save else []

    def require_grad(self, names: Sequence[str], *, only: bool = False, requires_grad: bool = True) -> None:
        """Sets whether the copies of the named adapters are trained; `only` freezes all others."""
        for name, module in self.modules_to_save.items():
            if name in names or only:
                module.requires_grad_(requires_grad and name in names)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Drops an adapter's copy."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self.forget(adapter_name)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """From the names of an adapter's tensors in a file to their names here, both within this module."""
        return {name: own for name, own, _ in self.parameters_of(adapter_name)}

    def parameters_of(self, adapter: str) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Each tensor of an adapter's copy as (name within the module, name within this one, tensor), buffers
        included.
        """
        if adapter in self.modules_to_save:
            for name, tensor in self.modules_to_save[adapter].state_dict(keep_vars=True).items():
                yield name, f"modules_to_save.{adapter}.{name}", tensor
