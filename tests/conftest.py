"""What every test starts from: one thread, fixed seeds, no network."""

import os
import random
import socket
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# A model's first call may take seconds on a busy machine, which says nothing about the law under test. One
# version of a test draws the same examples on every run, so that a red check can be run again.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=50,
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers whatever ran before."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a connection to another machine fail the test that tries it."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or str(address[0]) in {"127.0.0.1", "::1", "localhost"}:
            connect(self, address)
        else:
            pytest.fail(f"a test tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
