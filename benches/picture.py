"""Draws benches/results/speed.svg from the readings beside it: how many times peftrs' time PEFT takes.

python benches/picture.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"

# What is drawn: a line of the picture, the file, its row, and the side that is compared with peftrs'.
GROUPS: dict[str, list[tuple[str, str, str, str]]] = {
    "starting": [
        ("import three names", "lifecycle", "import of three names", "peft"),
        ("adapt a 70B model's layers", "lifecycle", "get_peft_model, 70B", "peft"),
        ("load an adapter of 790 MB", "lifecycle", "from_pretrained, 790 MB", "peft"),
    ],
    "switching": [
        ("turn adapters off, 70B", "lifecycle", "disable_adapter, 70B", "peft"),
        ("set_adapter, 70B", "lifecycle_switching", "set_adapter, 70B", "peft"),
        ("attach 100 adapters", "lifecycle_hundred", "100 adapters, 8 layers", "peft"),
    ],
    "merging": [
        (
            "2.2 GB checkpoint on disk, r=16",
            "merge_disk_others",
            "merge 2.20 GB of bfloat16, rank 16",
            "PEFT",
        ),
        (
            "layer in memory, r=16",
            "merge_memory_quiet",
            "merge_and_unload 4096x14336 r=16 bf16 base f32 adapter",
            "peft",
        ),
        (
            "layer in memory, r=64",
            "merge_memory_quiet",
            "merge_and_unload 4096x14336 r=64 bf16 base f32 adapter",
            "peft",
        ),
        ("two adapters into one (svd)", "weighted_svd", "svd, 1 of 2048²", "peft"),
    ],
    "training, a whole step": [
        ("bfloat16", "train_step", "torch.bfloat16, dropout 0.0", "peft"),
        ("bfloat16, dropout", "train_step", "torch.bfloat16, dropout 0.05", "peft"),
        ("float32", "train_step_float32", "torch.float32, dropout 0.0", "peft"),
        ("float32, dropout", "train_step_float32", "torch.float32, dropout 0.05", "peft"),
    ],
}


def ratio(file: str, row: str, side: str) -> float:
    rows = json.loads((RESULTS / f"{file}.json").read_text())["rows"]
    return float(next(each for each in rows if each["row"] == row)["ratios"][side])


def draw(target: Path) -> None:
    # No date and no random names: the same readings give the same file.
    mpl.rcParams |= {
        "svg.hashsalt": "peftrs",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    place, places, labels = 0.0, [], []
    for color, (group, bars) in zip(mpl.color_sequences["tab10"], GROUPS.items(), strict=False):
        for label, *where in bars:
            value = ratio(*where)
            axes.barh(place, value - 1, left=1, color=color, label=group if label == bars[0][0] else None)
            axes.text(value * 1.06, place, f"{value:.2f}" if value < 2 else f"{value:,.0f}", va="center")
            places, labels, place = [*places, place], [*labels, label], place + 1
        place += 0.6
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0.8, None)
    axes.set_xlabel("PEFT's time / peftrs' time, on two cores of an AMD EPYC")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "speed.svg")
