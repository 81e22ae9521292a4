"""LoftQ: the base is quantized, and the first factors make up for what that loses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftrs.bases.kinds import Affine
from peftrs.errors import ConfigError
from peftrs.methods.lora.inits.start import Start, principal

BITS = (4, 8)


@dataclass
class LoftQConfig:
    """How the base is quantized: to nf4 (`loftq_bits=4`) or int8 (8), with that many rounds of
    `loftq_iter`.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass(frozen=True)
class Loftq(Start):
    """Li et al. 2023, https://arxiv.org/abs/2310.08659, algorithm 1: `Q = quantized(W - s·B·A)`, then `s·B·A
    ≈ W - Q` of rank `r`.

    The base becomes `Q`, in its own dtype: what the adapter is for is a base quantized like this one. The
    factors are divided by the scaling, which PEFT leaves out.
    """

    bits: int
    iterations: int
    rebases: ClassVar[bool] = True

    @staticmethod
    def of(settings: dict[str, Any]) -> Loftq:
        """The start that a config's `loftq_config` asks for. Raises `ConfigError`."""
        if not settings:
            raise ConfigError(
                "init_lora_weights='loftq' needs `loftq_config`, such as LoftQConfig(loftq_bits=4)"
            )
        bits, iterations = settings.get("loftq_bits", 4), settings.get("loftq_iter", 1)
        if bits not in BITS:
            raise ConfigError(
                f"`loftq_bits` is {bits}: nf4 (4) and int8 (8) are what bitsandbytes quantizes to"
            )
        if not isinstance(iterations, int) or iterations < 1:
            raise ConfigError(f"`loftq_iter` is {iterations}, not a positive number of rounds")
        return Loftq(bits, iterations)

    def __call__(self, adapter: Any, base: Affine) -> dict[str, Tensor]:
        weight = base.weight.detach().float()
        return factors(weight - self._quantized(adapter, weight), adapter)

    def rebase(self, adapter: Any, base: Affine) -> Tensor:
        """`Q`, which takes the base's place."""
        return self._quantized(adapter, base.weight.detach().float())

    def _quantized(self, adapter: Any, weight: Tensor) -> Tensor:
        from peftrs.bases.bnb import rounded

        found = rounded(weight, self.bits)
        for _ in range(self.iterations - 1):
            first = factors(weight - found, adapter)
            found = rounded(
                weight - adapter.scaling * (first["lora_B.weight"] @ first["lora_A.weight"]), self.bits
            )
        return found


def factors(residual: Tensor, adapter: Any) -> dict[str, Tensor]:
    """The best factors of the adapter's rank for a residual `(out, in)`."""
    left, singular, right = torch.linalg.svd(residual, full_matrices=False)
    return principal(left, singular, right, adapter)
