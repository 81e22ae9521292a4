"""AWQ (https://arxiv.org/abs/2306.00978) as gptqmodel runs it, and AutoAWQ's `WQLinear_*`, from which its
kernels come.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peftrs.bases.base import Base
from peftrs.bases.gptq import Gptq, is_awq


class Awq(Gptq):
    """Packed codes with scales and zeros.

    AutoAWQ names the number of bits otherwise, and says of no kernel that it trains.
    """

    method = "awq"

    def format(self, module: nn.Module) -> str:
        layer: Any = module
        return f"awq {layer.w_bit if hasattr(layer, 'w_bit') else layer.bits}-bit"


AWQ = Awq()


def resolve(module: nn.Module) -> Base | None:
    """The base of an AWQ layer of gptqmodel or AutoAWQ."""
    kinds = type(module).__mro__
    ours = any(kind.__name__.startswith("WQLinear") for kind in kinds)
    return (
        AWQ
        if ours or (any(kind.__name__ == "BaseQuantLinear" for kind in kinds) and is_awq(module))
        else None
    )
