"""Runs the benches: each row does the same work with peftrs and with others, checks that the results agree,
then times all.

    python benches/run.py [--rows MODULE ...] [--quick] [--only NAME] [--output FILE]

Runs are interleaved (ours, theirs, ours, ...), the median and the range are printed with the ratio of each
side's median to the first side's; the JSON has every reading, with device, versions and date. A ratio above 1
means that the first side is faster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import peftrs

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Taken:
    """Milliseconds by the clock, and of the processor, of the program and of the system for it."""

    elapsed: float
    processor: float


@dataclass(frozen=True)
class Row:
    """One comparison: `make` builds a side's work and returns a function to time, a check runs first.

    What the function returns is the time in milliseconds where it is a float or `Taken`, for work in another
    process; else the time is taken here.
    """

    name: str
    make: Callable[[str, bool], Callable[[], object]]
    check: Callable[[bool], None]
    sides: tuple[str, ...] = ("peftrs", "peft")
    most: int = 99
    """How often it is run at most, for what takes minutes."""


def both_agree(run: Callable[[Any, bool], torch.Tensor], quick: bool, tolerance: float) -> None:
    """Ends the program where the two libraries' results lie further apart than this, as ‖difference‖ /
    ‖theirs‖.
    """
    ours, theirs = (run(import_module(name), quick) for name in ("peftrs", "peft"))
    distance = ((ours - theirs).norm() / theirs.norm()).item()
    if not distance <= tolerance:
        raise SystemExit(f"results differ by {distance:.1e}: nothing is timed")


def measure(row: Row, quick: bool, runs: int, warm: int = 1) -> dict[str, Any]:
    """Checks, warms up by so many runs, then times all sides in turn."""
    row.check(quick)
    sides = {name: row.make(name, quick) for name in row.sides}
    readings: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(-warm, runs):
        for name, work in sides.items():
            before = time.process_time()
            start = time.perf_counter()
            told = work()
            here = Taken((time.perf_counter() - start) * 1e3, (time.process_time() - before) * 1e3)
            taken = told if isinstance(told, Taken) else here
            if index >= 0:
                readings[name].append(told if isinstance(told, float) else taken.elapsed)
                processor[name].extend([] if isinstance(told, float) else [taken.processor])
    medians = {name: statistics.median(values) for name, values in readings.items()}
    ratios = {name: median / medians[row.sides[0]] for name, median in medians.items()}
    used_medians = {name: statistics.median(values) for name, values in processor.items() if values}
    result = {
        "row": row.name,
        "unit": "ms",
        "ratios": ratios,
        "medians": medians,
        "processor_medians": used_medians,
    }
    return {**result, "readings": readings, "load": os.getloadavg()[0]}


def shown(result: dict[str, Any]) -> str:
    """One line a side: median, range, ratio to the first, and the processor's time where it is known."""
    used = {name: f"  processor {value:.2f} ms" for name, value in result["processor_medians"].items()}
    lines = [
        f"  {name:<28} {result['medians'][name]:12.2f} ms  [{min(values):.2f}-{max(values):.2f}]  x"
        f" {result['ratios'][name]:.2f}" + used.get(name, "")
        for name, values in result["readings"].items()
    ]
    return "\n".join([result["row"], *lines])


def about(threads: int = 1) -> dict[str, Any]:
    """Where and with what a result was measured."""
    model = next(
        (line.split(": ")[1] for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    names = ("torch", "transformers", "peft", "safetensors")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{model}, {os.cpu_count()} cores, {threads} threads used",
        "versions": {"peftrs": peftrs.__version__, **{name: version(name) for name in names}},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write(path: Path | None, results: list[dict[str, Any]], threads: int = 1) -> None:
    """Writes what was measured as JSON."""
    if path:
        path.write_text(json.dumps({"about": about(threads), "rows": results}, indent=1) + "\n")


def options(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every bench takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything still runs")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--runs", type=int, help="[default: 7, or 2 if quick]")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    return parser


def run(rows: Sequence[Row], arguments: argparse.Namespace, threads: int = 1) -> None:
    """Measures rows, prints them and writes them."""
    results = []
    for row in rows:
        if arguments.only in row.name:
            results.append(
                measure(row, arguments.quick, min(row.most, arguments.runs or (2 if arguments.quick else 7)))
            )
            print(shown(results[-1]), flush=True)
    write(arguments.output, results, threads)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--rows", nargs="+", default=["rows"], help="the modules beside this one that have the rows"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run([row for module in arguments.rows for row in import_module(module).ROWS], arguments)


if __name__ == "__main__":
    # By its name, so that the rows' modules, which import it, and what runs them mean the same classes.
    import_module("run").main()
