"""Fine-tunes a real model on real text by LoRA and in full, then saves, reloads and merges the adapter.

MiniLM (6 layers, 22.7 million parameters) learns to tell praise from complaint in snippets of film reviews.
Both trainings start from the same weights, see the same batches and take the same number of steps.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from rich.console import Console
from rich.table import Table

import reviews
import sentiment

console = Console(soft_wrap=True)


def alone(stage: Callable[..., Any], *arguments: Any) -> Any:
    """What a stage returns, run in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(stage, *arguments).result()


def merge(base: Path, adapter: Path, merged: Path) -> float:
    """Runs `peftrs-merge` and returns the seconds it took."""
    command = [Path(sysconfig.get_path("scripts")) / "peftrs-merge", base, adapter, "-o", merged]
    console.print(f"[bold]$ peftrs-merge {base} {adapter} -o {merged}")
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - began


def classes(logits: list[list[float]]) -> list[int]:
    """The label that each pair of logits votes for."""
    return [int(positive > negative) for negative, positive in logits]


def agree(name: str, logits: list[list[float]], trained: list[list[float]]) -> bool:
    """Prints and returns whether a reloaded model predicts what the trained one did."""
    same = sum(one == other for one, other in zip(classes(logits), classes(trained), strict=True))
    farthest = max(
        abs(a - b)
        for one, other in zip(logits, trained, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    console.print(
        f"{name}: {same} of {len(trained)} predictions the same, logits at most {farthest:.1e} apart"
    )
    return same == len(trained)


def size(folder: Path) -> int:
    """The bytes of the tensors in a saved folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def report(outcomes: dict[str, sentiment.Outcome], labels: list[int], sizes: dict[str, int]) -> Table:
    """The two trainings side by side."""
    table = Table("", *outcomes, title=f"Sentiment of {len(labels)} test snippets", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, show: Callable[[sentiment.Outcome], str]) -> None:
        table.add_row(name, *(show(outcome) for outcome in outcomes.values()))

    def accuracy(outcome: sentiment.Outcome) -> float:
        return sum(one == label for one, label in zip(classes(outcome.logits), labels, strict=True)) / len(
            labels
        )

    row("accuracy", lambda outcome: f"{accuracy(outcome):.2%}")
    row(
        "parameters trained",
        lambda outcome: f"{outcome.trained:,} ({outcome.trained / outcome.parameters:.2%})",
    )
    row("steps", lambda outcome: f"{outcome.steps}")
    row("training time", lambda outcome: f"{outcome.seconds:.0f} s")
    row("peak memory", lambda outcome: f"{outcome.peak / 1e6:,.0f} MB")
    row("  of which before training", lambda outcome: f"{outcome.resting / 1e6:,.0f} MB")
    table.add_row("saved file", *(f"{sizes[name] / 1e3:,.0f} kB" for name in outcomes))
    return table


def draw(outcomes: dict[str, sentiment.Outcome], picture: Path) -> None:
    """Draws both loss curves: every logged mean faintly, their running mean over 8 boldly."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, outcome in outcomes.items():
        steps = [step for step, _ in outcome.losses]
        losses = [loss for _, loss in outcome.losses]
        windows = [losses[max(0, end - 8) : end] for end in range(1, len(losses) + 1)]
        (line,) = axes.plot(steps, [sum(window) / len(window) for window in windows], label=name, linewidth=2)
        axes.plot(steps, losses, color=line.get_color(), alpha=0.25, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss (cross-entropy)", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)


def main() -> int:
    """Runs every stage; fails if a reloaded or merged model does not predict what the trained one did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="source distribution of vaderSentiment 3.3.2"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write models and the picture to"
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="steps of each training (248 see each snippet once)"
    )
    options = parser.parse_args()

    began = time.perf_counter()
    output: Path = options.output
    shutil.rmtree(output, ignore_errors=True)
    base, adapter, full, merged = (output / name for name in ("base", "adapter", "full", "merged"))
    training, test = reviews.load(options.data)
    labels = [review.label for review in test]
    majority = max(labels.count(0), labels.count(1)) / len(labels)
    console.print(
        f"{len(training)} snippets to train on, {len(test)} to test; always the same answer: {majority:.2%}"
    )

    alone(sentiment.save_base, base)
    outcomes: dict[str, sentiment.Outcome] = {}
    for name, kind, folder in (("LoRA", "lora", adapter), ("full fine-tuning", "full", full)):
        console.print(f"[bold]{name}")
        outcomes[name] = alone(sentiment.train, kind, base, folder, options.data, options.steps)
    console.print(report(outcomes, labels, {"LoRA": size(adapter), "full fine-tuning": size(full)}))

    trained = outcomes["LoRA"].logits
    reloaded = agree(
        "adapter on a fresh base", alone(sentiment.reload_adapter, base, adapter, options.data), trained
    )
    console.print(f"merged in {merge(base, adapter, merged):.1f} s, {size(merged) / 1e6:,.1f} MB")
    unchanged = agree(
        "merged, by transformers alone", alone(sentiment.load_merged, merged, options.data), trained
    )

    picture = output / "losses.png"
    draw(outcomes, picture)
    console.print(f"loss curves: {picture}\nall of it took {time.perf_counter() - began:.0f} s")
    return 0 if reloaded and unchanged else 1


if __name__ == "__main__":
    sys.exit(main())
