"""Which dtype an adapter's tensors get."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = frozenset(
    kind
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype) and kind.is_floating_point and kind.itemsize < 4
)
"""Floating-point dtypes too coarse to train in: adapters over such weights are kept in float32 unless told
otherwise.
"""


def adapter_dtype(weight: Tensor, autocast_adapter_dtype: bool) -> torch.dtype:
    """The dtype of adapters over a weight: its own, or float32 where that is narrower and
    `autocast_adapter_dtype` is set.

    Weights that are not floating point (quantized ones) get float32.
    """
    if not weight.dtype.is_floating_point or (autocast_adapter_dtype and weight.dtype in NARROW):
        return torch.float32
    return weight.dtype
