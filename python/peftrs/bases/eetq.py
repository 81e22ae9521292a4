"""EETQ: int8 weights in a layout of its kernel, which runs in float16 and without a graph."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from peftrs.bases.base import Base
from peftrs.bases.quantized import Readable

NAMES = frozenset({"EetqLinear", "EETQLinear", "W8A16Linear"})


class Eetq(Readable):
    """The weight lies as the kernel wants it, `(in, out)` interleaved: the identity reads it."""

    def format(self, module: nn.Module) -> str:
        return "eetq int8"

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        stored = getattr(module, "weight", None)
        return cast(nn.Parameter, module.qweight if stored is None else stored), cast(
            "nn.Parameter | None", module.bias
        )

    def dtype(self, module: nn.Module) -> torch.dtype:
        return torch.float16

    def differentiable(self, module: nn.Module) -> bool:
        return False


EETQ = Eetq()


def resolve(module: nn.Module) -> Base | None:
    """The base of a layer of EETQ."""
    return EETQ if NAMES & {kind.__name__ for kind in type(module).__mro__} else None
