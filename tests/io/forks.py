"""A program that loads and merges, forks, and has its children do the same, for `test_forks`.

Its arguments are a folder with a model (`base`) and an adapter of it (`adapter`), the way to try, and how
many children to make.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import peftrs
from peftrs import cli
from peftrs.io.checkpoint import FileSource
from peftrs.ops.low_rank import Update, add_low_rank_

SIZE, RANK = 512, 8
LIMIT = 60
"""Seconds that a child may take with its own children; it takes less than one."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(SIZE, SIZE, bias=False)
        self.second = nn.Linear(SIZE, SIZE, bias=False)


def load_and_merge(folder: Path) -> Tensor:
    """The merged weights, one below the other."""
    merged = peftrs.PeftModel.from_pretrained(Net(), folder / "adapter").merge_and_unload()
    return torch.cat([layer.weight.detach() for layer in merged.children()])


def call_tools(folder: Path) -> None:
    """Merges on disk, and has every command look that reads tensors."""
    base, adapter, out = (str(folder / name) for name in ("base", "adapter", f"out-{os.getpid()}"))
    for program, *arguments in (
        (cli.merge, base, adapter, "-o", out, "--check", "--quiet", "--no-sync"),
        (cli.tool, "verify", base, adapter, out, "--json"),
        (cli.tool, "inspect", adapter, "--norms", "--json"),
        (cli.tool, "inspect", out, "--norms", "--json"),
        (cli.tool, "diff", adapter, adapter, "--json"),
        (cli.tool, "diff", base, out, "--json"),
    ):
        sys.argv[1:] = arguments
        code = program()
        assert code == 0, f"{arguments} ended with {code}"


def run(work: Callable[[], object]) -> None:
    """Runs `work` in a child, and leaves with an error unless it ends well within the limit."""
    faulthandler.cancel_dump_traceback_later()  # its thread would be missing in the child as well
    process = os.fork()
    if process == 0:
        faulthandler.dump_traceback_later(LIMIT / 2)
        code = 1
        try:
            work()
            # The process's pool has the threads that the environment asks for, and the child made it.
            assert len(os.listdir("/proc/self/task")) > int(os.environ["RAYON_NUM_THREADS"]), (
                "it worked alone"
            )
            code = 0
        finally:
            # A child must not go on with what its parent was to do next.
            if code:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if code := os.waitstatus_to_exitcode(status):
                sys.exit(f"child {process} ended with {code}")
            return
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    sys.exit(f"child {process} did not end in {LIMIT} s")


@contextlib.contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Other threads load and merge meanwhile, so that a fork meets whatever they hold."""
    done = threading.Event()

    def go_on() -> None:
        weight, update = torch.zeros(SIZE, SIZE), Update(torch.ones(SIZE, RANK), torch.ones(RANK, SIZE), 1e-3)
        source = FileSource(str(folder / "adapter"))
        names = list(source.described())
        while not done.is_set():
            source.read_all(names)
            add_low_rank_(weight, update)

    threads = [threading.Thread(target=go_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


class Merged(Dataset[Tensor]):
    """Items that take an adapter to make, which each worker loads for itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return load_and_merge(self.folder)[index]


def main(folder: Path, way: str, count: int) -> None:
    expected = load_and_merge(folder)

    def again() -> None:
        assert torch.equal(load_and_merge(folder), expected), "it merged other weights"

    if way == "again":
        for _ in range(count):
            run(again)
    elif way == "tools":
        call_tools(folder)
        for _ in range(count):
            run(lambda: call_tools(folder))
    elif way == "descendants":

        def descend(left: int) -> None:
            again()
            if left > 1:
                run(lambda: descend(left - 1))

        run(lambda: descend(count))
    elif way == "threads":
        with at_work(folder):
            for _ in range(count):
                run(again)
    else:
        loader = DataLoader(Merged(folder), num_workers=2, multiprocessing_context="fork", timeout=LIMIT)
        assert torch.equal(torch.cat(list(loader)), expected[:4])
    again()


if __name__ == "__main__":
    # torch's own threads survive no fork where they are GNU's, so it gets none; the kernels get several.
    torch.set_num_threads(1)
    torch.get_num_threads = lambda: 4  # type: ignore[assignment]
    # Said from Python 3.12 on; what it warns of is what is tried here.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
