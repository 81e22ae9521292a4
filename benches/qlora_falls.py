"""Whether the loss over nf4 falls as over bfloat16 does: SmolLM2-135M-Instruct learns to write film reviews
from several seeds.

    python benches/qlora_falls.py --folder WORK --data vaderSentiment-3.3.2.tar.gz [--seeds 0 1 2 3 4 5]
    [--steps 30] [--json FILE]

A seed settles the start of the adapter and the order of the training snippets, the same over each base. What
is measured is the mean loss on the same held-out snippets before and after; the difference of the two is the
fall. Beside nf4 stand the weights from before it and the values that it left of them ("rounded"), both in
bfloat16, which tells what training over nf4 costs from what rounding to it does; and PEFT's runs over nf4.
Every run is written to the file when it is done, and those that are there are not run again. The source
distribution with the snippets is what `make demo` loads.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import qlora_smollm2 as bench
import torch
import transformers
from transformers import AutoTokenizer

import reviews  # beside the lesson that the other bench imports

LENGTH, HELD_OUT = 128, 12
SIDES = (("peftrs", "nf4"), ("peftrs", "rounded"), ("peftrs", "bf16"), ("peft", "nf4"))


def rows(tokenizer: Any, snippets: list[reviews.Review]) -> torch.Tensor:
    """The snippets one after the other as rows of `LENGTH` tokens."""
    tokens = tokenizer("\n".join(snippet.text for snippet in snippets), return_tensors="pt").input_ids[0]
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


@torch.no_grad()
def loss_on(model: Any, held_out: torch.Tensor) -> float:
    """The mean cross-entropy of the rows, in nats."""
    # Nothing drops out in training mode; in eval bitsandbytes packs its weights on some CPUs, over which PEFT
    # does not train.
    model.train()
    return statistics.fmean(float(model(input_ids=row[None], labels=row[None]).loss) for row in held_out)


def run(folder: Path, data: Path, name: str, kind: str, seed: int, steps: int) -> dict[str, Any]:
    """One training: the losses of its steps, and those on what was held out."""
    library: Any = __import__(name)
    train, test = reviews.load(data)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = rows(tokenizer, test)[:HELD_OUT]
    random.Random(seed).shuffle(train)
    batches = rows(tokenizer, train[: 10 * steps])[:steps]
    model = library.prepare_model_for_kbit_training(
        bench.load(folder, kind), use_gradient_checkpointing=False
    )
    torch.manual_seed(seed)
    config = library.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=bench.TARGETS)
    model = library.get_peft_model(model, config)
    before = loss_on(model, held_out)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=5e-4)
    losses = []
    for row in batches:
        loss = model(input_ids=row[None], labels=row[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    told = {"library": name, "base": kind, "seed": seed, "steps": steps, "before": before}
    return told | {"after": loss_on(model, held_out), "losses": losses}


def told(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def summary(runs: list[dict[str, Any]]) -> str:
    """Means and standard deviations over each side's seeds, and of the differences seed by seed."""
    found = {
        side: {one["seed"]: one for one in runs if (one["library"], one["base"]) == side} for side in SIDES
    }
    found = {side: by_seed for side, by_seed in found.items() if len(by_seed) > 1}
    if not found:
        return "two seeds on a side are needed for a spread"

    def measured(side: tuple[str, str], seeds: Iterable[int]) -> dict[str, list[float]]:
        chosen = [found[side][seed] for seed in sorted(seeds)]
        return {
            "fall": [one["before"] - one["after"] for one in chosen],
            "held out after": [one["after"] for one in chosen],
            "last ten steps": [statistics.fmean(one["losses"][-10:]) for one in chosen],
        }

    lines = []
    for side, by_seed in found.items():
        parts = [f"{what} {told(values)}" for what, values in measured(side, by_seed).items()]
        before = next(iter(by_seed.values()))["before"]
        lines.append(
            f"{' '.join(side)}, {len(by_seed)} seeds: held out before {before:.4f}; {'; '.join(parts)}"
        )
    first, *others = found
    for other in others:
        seeds = found[first].keys() & found[other].keys()
        pairs = zip(measured(first, seeds).items(), measured(other, seeds).values(), strict=True)
        apart = [
            f"{what} {told([a - b for a, b in zip(one, another, strict=True)])}"
            for (what, one), another in pairs
        ]
        lines.append(f"{' '.join(first)} less {' '.join(other)}, {len(seeds)} seeds: {'; '.join(apart)}")
    return "\n".join(["mean ± standard deviation over seeds", *lines])


def main() -> None:
    """Runs what is not in the file yet, and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the model is written, or lies")
    parser.add_argument("--data", type=Path, required=True, help="the source distribution of vaderSentiment")
    parser.add_argument("--seeds", type=int, nargs="*", default=range(6))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path, help="where the runs are read and written")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base = given.folder / "base"
    if not base.exists():
        bench.lesson.save_base(base)
    runs: list[dict[str, Any]] = (
        json.loads(given.json.read_text()) if given.json is not None and given.json.exists() else []
    )
    for seed in given.seeds:
        for name, kind in SIDES:
            if any(
                (one["library"], one["base"], one["seed"], one["steps"]) == (name, kind, seed, given.steps)
                for one in runs
            ):
                continue
            runs.append(run(base, given.data, name, kind, seed, given.steps))
            if given.json is not None:
                given.json.parent.mkdir(exist_ok=True)
                given.json.write_text(json.dumps(runs, indent=1) + "\n")
    sys.stdout.write(summary([one for one in runs if one["steps"] == given.steps]) + "\n")


if __name__ == "__main__":
    main()
