"""Tensors of which a process holds a part, or none for now: what they are as a whole, and values put into
them.

What spreads or puts away a model's parameters: torch's `DTensor` (FSDP2, tensor parallelism), DeepSpeed's
ZeRO-3, which leaves an empty tensor in each process, and FSDP1, whose parameters are views of one flat shard.
What is gathered is gathered by all processes together: each of them must ask, in the same order.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn


def is_distributed(tensor: Tensor) -> TypeGuard[Any]:
    """Whether this is a `DTensor`, told without importing what makes them."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has this parameter in parts now."""
    return hasattr(tensor, "ds_id") and tensor.numel() != cast(Any, tensor).ds_numel


def in_parts(tensor: Tensor) -> bool:
    """Whether a process holds but a part of the tensor, or none."""
    return is_distributed(tensor) or is_partitioned(tensor)


def shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the tensor as a whole."""
    return tuple(cast(Any, tensor).ds_shape if is_partitioned(tensor) else tensor.shape)


def whole(tensor: Tensor) -> Tensor:
    """The values of the whole tensor; itself where nothing is missing, else a copy, which all processes make
    together.
    """
    if is_distributed(tensor):
        return cast(Tensor, tensor.full_tensor())
    if hasattr(tensor, "ds_id"):
        with gathered([tensor]):
            return tensor.detach().clone()
    return tensor


def alike(tensor: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The tensor as one to be computed with together with others: spread over the same processes as they are,
    or whole.
    """
    spread: Any = next((other for other in others if is_distributed(other)), None)
    if spread is None or is_distributed(tensor):
        return tensor if spread is not None else whole(tensor)
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(
        tensor.detach(), spread.device_mesh, [Replicate()] * spread.device_mesh.ndim, src_data_rank=None
    )


def everywhere(tensor: Tensor) -> Tensor:
    """The tensor with all its values in each process, for what is small and of a shape that lies badly;
    differentiable.
    """
    if not is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    return cast(Tensor, tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim))


def summed(tensor: Tensor) -> Tensor:
    """The tensor without sums that are still to be made over processes."""
    if not is_distributed(tensor) or not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    return cast(Tensor, tensor.redistribute(placements=placements))


@contextmanager
def gathered(tensors: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
    """Brings parameters of ZeRO-3 together inside the `with`; with `write` what the first process puts into
    them is kept.
    """
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor)]
    if not partitioned:
        yield
        return
    zero = importlib.import_module("deepspeed").zero
    with zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


@torch.no_grad()
def overwrite(held: Tensor, value: Tensor) -> None:
    """Puts the values of a whole tensor into one that may be spread."""
    if is_distributed(value):
        value = value if is_distributed(held) else value.full_tensor()
    elif is_distributed(held):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(
            value.to(held.device, held.dtype), held.device_mesh, held.placements, src_data_rank=None
        )
    with gathered([held], write=True):
        held.copy_(value)


def reshard(model: nn.Module) -> None:
    """Drops what FSDP2 gathered for a forward and still has: what is written into that would be lost at the
    next one.
    """
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for module in model.modules():
        if isinstance(module, kind):
            cast(Any, module).reshard()


def sharded_by(model: nn.Module) -> str | None:
    """What spreads the model's parameters already and would leave new ones out of its averaging of gradients,
    or None.
    """
    sharded: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    flat: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return "DistributedDataParallel"
        if isinstance(module, sharded):
            return "fully_shard"
        if isinstance(module, flat):
            return "FullyShardedDataParallel"
    return None
