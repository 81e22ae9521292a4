"""Processes that work together over gloo, and what each of them brought back."""

from __future__ import annotations

import datetime
import importlib
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = datetime.timedelta(seconds=240)


def work(rank: int, world: int, port: int, tasks: list[str], folder: str) -> None:
    """What one process does: every task in turn, its result or its error into a file of its own."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=PATIENCE)
    for task in tasks:
        module, _, name = task.rpartition(".")
        torch.manual_seed(0)
        found = getattr(importlib.import_module(module), name)(Path(folder))
        torch.save(found, Path(folder) / f"{name}.{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


def run(world: int, tasks: list[str], folder: Path) -> None:
    """Runs tasks, named by module and function, in `world` processes; raises what any of them raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (world, port, tasks, str(folder)), nprocs=world)  # type: ignore[no-untyped-call]


def results(folder: Path, name: str, world: int) -> list[Any]:
    """What a task brought back, process by process."""
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(world)]
