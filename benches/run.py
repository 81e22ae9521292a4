"""Runs the benches: each row does the same work with peftrs and with PEFT, checks that the results agree, then times both.

    python benches/run.py [--quick] [--only NAME] [--output FILE]

Runs are interleaved (ours, theirs, ours, ...), the median and the range are printed with the ratio of the medians; the JSON has
every reading, with device, versions and date. A ratio above 1 means that peftrs is faster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Row:
    """One comparison: `make` builds a side's work for a library and returns a function to time, a check runs first."""

    name: str
    make: Callable[[str, bool], Callable[[], object]]
    check: Callable[[bool], None]
    unit: str = "ms"


def measure(row: Row, quick: bool, runs: int) -> dict[str, object]:
    """Checks, warms up, then times both sides in turn."""
    row.check(quick)
    sides = {name: row.make(name, quick) for name in ("peftrs", "peft")}
    readings: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(runs + 1):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            elapsed = (time.perf_counter() - start) * 1e3
            if index:
                readings[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in readings.items()}
    return {
        "row": row.name,
        "unit": row.unit,
        "ratio": medians["peft"] / medians["peftrs"],
        "median": medians,
        "readings": readings,
    }


def main() -> None:
    from rows import ROWS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything still runs")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for row in ROWS:
        if options.only and options.only not in row.name:
            continue
        result = measure(row, options.quick, 2 if options.quick else options.runs)
        results.append(result)
        ours, theirs = (result["readings"][name] for name in ("peftrs", "peft"))  # type: ignore[index]
        print(
            f"{row.name:<34} peftrs {statistics.median(ours):9.2f} [{min(ours):.2f}-{max(ours):.2f}]  "
            f"PEFT {statistics.median(theirs):9.2f} [{min(theirs):.2f}-{max(theirs):.2f}] {row.unit}  ratio {result['ratio']:.2f}"
        )
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{platform.processor() or platform.machine()}, 1 thread",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
    }
    if options.output:
        options.output.write_text(json.dumps({"about": about, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
