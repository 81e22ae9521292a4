"""What adapters cost the host: Python around tiny products, beside the frozen layer, a plain module, PEFT and
an earlier peftrs.

    python benches/host.py [--before PYTHON] [--rounds 25] [--quick] [--only TEXT] [--out FILE]

`--before` is the interpreter of an environment that has an earlier peftrs: an installed wheel, as this side
should be too, since `make develop` builds without optimisation. Each round is a fresh process of each side in
turn (before, now, before, now, ...): what differs from process to process, such as the layout of memory,
would else be taken for a difference of the code. "now / before" is the median of the rounds' ratios, with
their quartiles. "frozen" and "plain" are no code of ours and are read on both sides too: their ratios say how
far from 1 the machine alone gets. Times are the processor's, of one thread.

A layer is called by itself, without gradients or with a backward pass that also reaches its input. A mixed
batch goes through the model, in evaluation, since it is the model that takes the names. "560 layers" are
linears of 16 × 16 in memory; "70B" is a Llama of that shape on the meta device, where the first
`get_peft_model` of a process is timed, lazily: torch and transformers are imported, and what a side imports
with the two names that it takes is beside it. Before anything is timed, outputs and gradients of every layer,
and what switching leaves, are compared with PEFT's under the same values.

JSON goes to benches/results/host.json, or to `--out`; with `--quick`, which is 3 rounds, to `--out` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from host_side import LIMIT, OURS, PLAIN, WIDE
from run import about

HERE = Path(__file__).parent
PEFT_ROUNDS = 5
"""PEFT only stands beside the comparison, and a round of it takes longer than one of ours."""


def ask(python: str, *arguments: str) -> Any:
    """What a fresh process of `host_side.py` tells."""
    # Compiled files are kept, for else each process would compile anew what it imports, within what is timed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [python, str(HERE / "host_side.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}: nothing is written\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles, to four digits."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    low, middle, high = (float(f"{one:.4g}") for one in quartiles)
    return {"median": middle, "quartiles": [low, high]}


def summed(readings: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """By row what the sides took, with the medians of the frozen layer and the plain module beside it."""
    rows: dict[str, dict[str, Any]] = {}
    for name, now in readings["now"].items():
        scale, unit = (1e3, "ms") if name in WIDE else (1e6, "µs")
        row: dict[str, Any] = {"row": name, "unit": unit}
        row |= {
            side: spread([one * scale for one in values[name]])
            for side, values in readings.items()
            if name in values
        }
        if "before" in readings:
            row["now / before"] = spread(
                [one / other for one, other in zip(now, readings["before"][name], strict=True)]
            )
        kind, _, rest = name.partition(", ")
        beside = {"frozen": f"frozen, {rest}", "plain": f"{PLAIN.get(kind)}, {rest}"} if kind in OURS else {}
        row |= {
            column: {"median": rows[other]["now"]["median"]}
            for column, other in beside.items()
            if other in rows
        }
        rows[name] = row
    return rows


def shown(row: dict[str, Any]) -> str:
    before, now, frozen, plain, peft = (
        f"{row[side]['median']:10.4g}" if side in row else " " * 10
        for side in ("before", "now", "frozen", "plain", "peft")
    )
    ratio = row.get("now / before")
    pairs = (
        f"{ratio['median']:8.3f} [{ratio['quartiles'][0]:.3f}-{ratio['quartiles'][1]:.3f}]"
        if ratio
        else " " * 22
    )
    return f"{row['row']:<50} {row['unit']} {before} {now} {pairs} {frozen} {plain} {peft}"


def compare(arguments: argparse.Namespace) -> None:
    """Checks both sides, then asks fresh processes of each in turn, prints what they tell and writes it."""
    sides = (
        {"before": arguments.before, "now": sys.executable} if arguments.before else {"now": sys.executable}
    )
    checked = {side: ask(python, "check") for side, python in sides.items()}
    largest, sources = (
        {side: one.pop(name) for side, one in checked.items()} for name in ("largest", "sources")
    )
    if any(one != checked["now"] for one in checked.values()):
        raise SystemExit(f"the sides differ in more than peftrs, so that nothing is timed: {checked}")
    if len(set(sources.values())) < len(sides):
        print("Both sides have the same Python sources.")
    rounds = arguments.rounds or (3 if arguments.quick else 25)
    readings: dict[str, dict[str, list[float]]] = {side: {} for side in (*sides, "peft")}
    load = 0.0
    for index in range(rounds):
        print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
        for side in readings if index < PEFT_ROUNDS else sides:
            work = ("peft" if side == "peft" else "peftrs", "--only", arguments.only)
            for row, taken in ask(sides.get(side, sys.executable), *work).items():
                readings[side].setdefault(row, []).append(taken)
        load = max(load, os.getloadavg()[0])
    rows = summed(readings)
    heads = [
        f"{one:>{22 if '/' in one else 10}}"
        for one in ("before", "now", "now / before", "frozen", "plain", "PEFT")
    ]
    print(f"{'':<53} {' '.join(heads)}", *map(shown, rows.values()), sep="\n")
    if out := arguments.out or (None if arguments.quick else HERE / "results" / "host.json"):
        agreement = (
            f"outputs and gradients differ from PEFT's by at most {max(largest.values()):.1e}, of {LIMIT}"
            " allowed"
        )
        told = {
            **about(),
            "agreement": agreement,
            "rounds": rounds,
            "rounds of PEFT": min(rounds, PEFT_ROUNDS),
            "load": load,
        }
        out.write_text(
            json.dumps({"about": {**told, "sources": sources}, "rows": [*rows.values()]}, indent=1) + "\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--before", metavar="PYTHON", help="the interpreter of an environment with an earlier peftrs"
    )
    parser.add_argument("--rounds", type=int, help="[default: 25, or 3 if quick]")
    parser.add_argument("--quick", action="store_true", help="3 rounds, to see that everything still runs")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument(
        "--out",
        type=Path,
        help="the JSON file to write [default: benches/results/host.json, or none if quick]",
    )
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
