"""What is asked of a model's adapters, whatever holds the model."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence

from torch import nn

from peftrs.bases.sharded import reshard
from peftrs.config import PeftConfig
from peftrs.core import manage
from peftrs.core.inject import activation, adapters
from peftrs.core.tree import adapted_layers
from peftrs.errors import AdapterError, PeftrsWarning
from peftrs.planning.attach import peft_configs


class Adapters(nn.Module):
    """A module that holds a model with adapters: their configs, which act, which are trained, merging."""

    @abstractmethod
    def get_base_model(self) -> nn.Module:
        """The user's model, with the adapters in it."""

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configs by adapter name."""
        return peft_configs(self.get_base_model())

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act, in order."""
        return list(activation(self.get_base_model()).active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The one adapter that acts, or all of several."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes one or several adapters act, in this order, and trains them alone (none with
        `inference_mode`).
        """
        manage.set_adapter(self.get_base_model(), adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets whether adapters are trained, leaving the others as they are."""
        manage.set_requires_grad(self.get_base_model(), adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes an adapter out of the model.

        Raises `AdapterError` for an unknown one or while it is merged.
        """
        if adapter_name not in self.peft_config:
            raise AdapterError(f"Adapter {adapter_name} does not exist")
        if adapter_name in adapters(self.get_base_model()):
            manage.delete_adapter(self.get_base_model(), adapter_name)
        del self.peft_config[adapter_name]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters (the active ones unless named) into the weights, or none of them; weights are
        always checked.
        """
        reshard(self)
        manage.merge(self.get_base_model(), adapter_names)

    def unmerge_adapter(self) -> None:
        """Restores the weights' bits from before the merge."""
        reshard(self)
        layers = list(adapted_layers(self.get_base_model()))
        if not any(layer.merged for layer in layers):
            warnings.warn("nothing is merged, nothing to do", PeftrsWarning, stacklevel=2)
        manage.unmerge(layers)
