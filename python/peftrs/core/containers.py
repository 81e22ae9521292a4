"""The modules that hold adapters' tensors: slot first, then adapter (`lora_A.default.weight`), as code for
PEFT reads them.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

from peftrs.torch_private import bare

SIDES = {"out_features": 0, "in_features": 1}
"""The dimension of a weight that each is the size of."""


class Leaves(nn.Module):
    """The tensors of one adapter in one container, by leaf name."""

    def __init__(self) -> None:
        bare(self)
        # Linear maps without a bias have one that is None, and code asks for it.
        self._parameters["bias"] = None

    def forward(self, x: Tensor) -> Tensor:
        """The linear map that a `weight` of two dimensions is, for code that calls `layer.lora_A[name]` and
        its like itself.
        """
        weight, bias = (cast("Tensor | None", self._parameters.get(leaf)) for leaf in ("weight", "bias"))
        if weight is None or weight.ndim != 2:
            text = "only a weight of two dimensions is a map by itself; call the layer"
            raise NotImplementedError(f"{self.extra_repr()}: {text}")
        return functional.linear(x, weight, bias)

    def __getattr__(self, name: str) -> Any:
        # What code asks the linear map for that it takes this to be.
        if name in SIDES and (weight := self._parameters.get("weight")) is not None and weight.ndim > 1:
            return weight.shape[SIDES[name]]
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in self.named_parameters())


class Container(nn.ModuleDict):
    """The tensors of all adapters in one container."""

    def __getattr__(self, name: str) -> Any:
        held: dict[str, Leaves] = self.__dict__.get("_modules", {})
        found = {
            adapter: leaves._parameters[name]
            for adapter, leaves in held.items()
            if name in leaves._parameters
        }
        # PEFT has the leaf before the adapter where it is not a linear map's.
        if found and name not in held and name not in ("weight", "bias"):
            return found
        return super().__getattr__(name)


class Entries(nn.ParameterDict):
    """A container whose entries are the tensors themselves, one an adapter."""

    # torch's own warns that a replica appears empty: slots are looked up as attributes, which replicas have.
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel
