"""GPTQ (https://arxiv.org/abs/2210.17323) as gptqmodel runs it: `BaseQuantLinear` and its kernels, AWQ's own
aside.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from peftrs.bases.base import Base
from peftrs.bases.quantized import Readable


class Gptq(Readable):
    """Packed codes with scales and zeros, all buffers.

    What a kernel stores besides is its own affair: the identity reads it.
    """

    method = "gptq"

    def format(self, module: nn.Module) -> str:
        return f"{self.method} {cast(Any, module).bits}-bit"

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        layer: Any = module
        # A kernel's `weight` may be a shim with no numbers; some repack their codes under another name.
        stored = next(one for one in (*layer.buffers(), *layer.parameters()) if not one.is_floating_point())
        return stored, getattr(layer, "bias", None)

    def differentiable(self, module: nn.Module) -> bool:
        """Most kernels are for inference, and say so."""
        return bool(getattr(module, "SUPPORTS_TRAINING", False))


GPTQ = Gptq()


def resolve(module: nn.Module) -> Base | None:
    """The base of a layer of gptqmodel, of any method but AWQ."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return GPTQ if "BaseQuantLinear" in kinds and not is_awq(module) else None


def is_awq(module: nn.Module) -> bool:
    """Whether a kernel of gptqmodel is for AWQ."""
    return any(getattr(one, "value", one) == "awq" for one in getattr(module, "SUPPORTS_METHODS", None) or ())
