"""AQLM: `QuantizedLinear`, sums of codebooks' vectors, https://arxiv.org/abs/2401.06118; its kernels have
their own backward.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from peftrs.bases.base import Base
from peftrs.bases.quantized import Readable


class Aqlm(Readable):
    """Codes, codebooks and scales; how codes lie in memory depends on the kernel chosen, so that the identity
    reads them.
    """

    def format(self, module: nn.Module) -> str:
        layer: Any = module
        return f"aqlm {layer.num_codebooks}x{layer.nbits_per_codebook}"

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        return cast(nn.Parameter, module.codes), cast("nn.Parameter | None", module.bias)


AQLM = Aqlm()


def resolve(module: nn.Module) -> Base | None:
    """The base of a `QuantizedLinear`."""
    return AQLM if any(kind.__name__ == "QuantizedLinear" for kind in type(module).__mro__) else None
