"""What the ways to start have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from peftrs.bases.kinds import Affine, LayerKind, LayerSpec


class Start(ABC):
    """First values for an adapter's slots. Instances compare equal when they do the same, and pickle."""

    changes_base: ClassVar[bool] = False
    """Whether the adapter is for the weight less the first change: that is kept beside the adapter."""
    rebases: ClassVar[bool] = False
    """Whether the adapter is for a weight that `rebase` computes, which takes the base's place."""
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR})

    def unfit(self, spec: LayerSpec, values: Mapping[str, Any], scaling: float) -> str | None:
        """Why an adapter of these values on a layer, and of this strength, cannot start like this, or None if
        it can.
        """
        if spec.kind not in self.kinds or spec.stacked:
            return f"not for {spec.kind} layers"
        if (fault := self.fault(values["r"], spec)) is not None:
            return fault
        if (self.changes_base or self.rebases) and scaling <= 0:
            return f"it divides by the scaling, which lora_alpha={values['lora_alpha']} makes {scaling}"
        return None

    def fault(self, rank: int, spec: LayerSpec) -> str | None:
        """What is wrong with the rank, or None: by default that the weight has no such many components."""
        smaller = min(spec.shape)
        return f"rank {rank} is over the smaller side of the weight, {smaller}" if rank > smaller else None

    @abstractmethod
    def __call__(self, adapter: Any, base: Affine) -> dict[str, Tensor]:
        """The first values by slot."""

    def rebase(self, adapter: Any, base: Affine) -> Tensor:
        """The weight that takes the base's place, `(out, in)`."""
        raise NotImplementedError(f"{type(self).__name__} leaves the base as it is")


def principal(left: Tensor, singular: Tensor, right: Tensor, adapter: Any) -> dict[str, Tensor]:
    """The factors of the first components of `U·S·Vᵀ`, as many as the adapter's rank: `A = √(S/s)·Vᵀ`, `B =
    U·√(S/s)`.
    """
    rank = adapter.values["r"]
    root = (singular[:rank] / adapter.scaling).sqrt()
    return {"lora_A.weight": root[:, None] * right[:rank], "lora_B.weight": left[:, :rank] * root}
