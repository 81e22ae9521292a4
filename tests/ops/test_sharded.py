"""Two processes that share a model's parameters train as one process does, whatever part of it they share."""

from __future__ import annotations

import datetime
import socket
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import peftrs
import peftrs.ops
from tests.laws.cases import distance

WORLD = 2


def model() -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4, bias=False))
    config = peftrs.LoraConfig(target_modules=["0", "2"], r=4, init_lora_weights=False)
    return peftrs.get_peft_model(base, config).train()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def root(one: nn.Module, shard: Callable[[nn.Module], object]) -> None:
    shard(one)


def layers(one: nn.Module, shard: Callable[[nn.Module], object]) -> None:
    for layer in (one.base_model.model[0], one.base_model.model[2]):
        shard(layer)
    shard(one)


def frozen(one: nn.Module, shard: Callable[[nn.Module], object]) -> None:
    """Only what lies beneath the adapters: their own tensors stay whole, as does nothing that the layer reads
    by itself.
    """
    for layer in (one.base_model.model[0], one.base_model.model[2]):
        shard(layer.base_layer)


PARTS = (root, layers, frozen)


def train(rank: int, port: int) -> None:
    from torch.distributed.fsdp import fully_shard

    wait = datetime.timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD, timeout=wait
    )
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    batches = torch.randn(WORLD, 5, 8, generator=torch.Generator().manual_seed(1))
    alone = model()
    (sum(alone(batch).square().mean() for batch in batches) / WORLD).backward()
    wanted = [one.grad for one in alone.parameters() if one.grad is not None]
    for part in PARTS:
        shared = model()
        part(shared, lambda module: fully_shard(module, mesh=mesh))
        y = shared(batches[rank])
        assert distance(y, alone(batches[rank])) < 2e-6, part.__name__
        y.square().mean().backward()
        found = [whole(one.grad) for one in shared.parameters() if one.grad is not None]
        if part is frozen:
            for one in found:
                dist.all_reduce(one)
                one /= WORLD
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert distance(one, other) < 1e-5, part.__name__
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="starts processes that load this module by its path")
def test_shared_parameters_train_as_whole_ones() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train, (port,), nprocs=WORLD)


if __name__ == "__main__":
    torch.multiprocessing.spawn(train, (int(sys.argv[1]),), nprocs=WORLD)
