"""QLoRA on SmolLM2-135M-Instruct on a CPU: nf4 with double quantization by bitsandbytes, beside PEFT and
beside a base in bfloat16.

    python benches/qlora_smollm2.py --folder WORK [--steps 15] [--seeds 3] [--json FILE]

Every run is a process of its own: it loads the same model, prepares it as its library does by default, adds
the same LoRA and takes the same steps; over nf4 and over bfloat16 from several starts of the adapter, which
is what noise is held to. Printed are the losses, the processor's seconds a step, the most that torch's
allocator had handed out at once in a step, by its own record, and by how much the process grew at most over
what it held when the model was loaded: while the adapter was added, in the steps, in saving. Then the adapter
saved here is loaded in PEFT, and merged: quantized again, into the dequantized weights in 16 bits, and into
the original ones.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import smollm2_instruct as lesson

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SECONDS, ALLOCATED = "processor's seconds a step", "allocated in a step, MB"
RUNS = (("peftrs", "nf4"), ("peft", "nf4"), ("peftrs", "bf16"))


def load(folder: Path, kind: str) -> Any:
    """The model in bfloat16, its linear layers in nf4 if asked, or in bfloat16 with the values that nf4 left
    ("rounded").
    """
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {} if kind == "bf16" else {"quantization_config": nf4, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    return model.dequantize() if kind == "rounded" else model


class Memory:
    """How far the process grows."""

    def __init__(self) -> None:
        gc.collect()
        self.start = self._read("VmRSS")

    def reset(self) -> None:
        """Starts a new peak."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        """The most that the process held since `reset`, over what it held at first, in MB."""
        return (self._read("VmHWM") - self.start) / 1000

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


def text(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The lesson's tokens and labels."""
    return lesson.lesson(AutoTokenizer.from_pretrained(folder), lesson.zen())


def warm(library: Any, folder: Path) -> None:
    """Makes the library import what it imports on use, which is no memory of the model's."""
    small = library.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), library.LoraConfig(target_modules=["0"])
    )
    small(torch.ones(1, 4)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small.save_pretrained(folder / "warm")
    library.prepare_model_for_kbit_training(torch.nn.Sequential(torch.nn.Linear(4, 4)))


def allocated(step: Callable[[], None]) -> float:
    """The most that torch's allocator had handed out at once in a step, over what was there before it, in
    MB.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    held = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def child(folder: Path, name: str, kind: str, seed: int, steps: int) -> dict[str, Any]:
    """One run."""
    library: Any = __import__(name)
    tokens, labels = text(folder)
    warm(library, folder)
    model = load(folder, kind)
    memory, grown = Memory(), {}
    memory.reset()
    library.prepare_model_for_kbit_training(model)
    if kind == "bf16":
        model.activation_checkpointing_enable()
    torch.manual_seed(seed)
    config = library.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=TARGETS)
    peft = library.get_peft_model(model, config).train()
    grown["add"] = memory.peak()
    memory.reset()
    optimizer = torch.optim.AdamW([one for one in peft.parameters() if one.requires_grad], lr=1e-3)
    losses, seconds = [], []

    def step() -> None:
        start = time.process_time()
        loss = peft(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
        losses.append(float(loss.detach()))

    for _ in range(steps):
        step()
    grown["steps"] = memory.peak()
    memory.reset()
    peft.save_pretrained(folder / f"adapter-{name}-{kind}-{seed}")
    grown["save"] = memory.peak()
    grown["everything, from nothing"] = max(grown.values()) + memory.start / 1000
    found = {"library": name, "base": kind, "seed": seed, "losses": losses[:steps], "grown": grown}
    return found | {SECONDS: sorted(seconds)[steps // 2], ALLOCATED: allocated(step)}


def spawn(folder: Path, name: str, kind: str, seed: int, steps: int) -> dict[str, Any]:
    """One run in a process of its own, whose freed memory goes back at once."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    command = [
        sys.executable,
        *sys.orig_argv[1 : sys.orig_argv.index(sys.argv[0])],
        __file__,
        "--folder",
        str(folder),
    ]
    done = subprocess.run(
        [*command, "--child", name, kind, str(seed), "--steps", str(steps)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def afterwards(folder: Path) -> dict[str, Any]:
    """What becomes of the adapter: loaded in PEFT, and merged."""
    import peft

    import peftrs

    tokens, labels = text(folder)
    adapter = folder / "adapter-peftrs-nf4-0"

    def outcome(model: Any, expected: torch.Tensor | None = None) -> tuple[dict[str, float], torch.Tensor]:
        found = model(input_ids=tokens, labels=labels)
        logits = found.logits.float()
        told = {"loss": float(found.loss)}
        if expected is not None:
            told["logits off by"] = float((logits - expected).norm() / expected.norm())
        return told, logits

    # In training mode: in eval the library packs what is not adapted for some CPUs, and rounds its scales.
    ours = peftrs.PeftModel.from_pretrained(load(folder, "nf4"), adapter).train()
    found: dict[str, Any] = {"without the adapter": outcome(load(folder, "nf4").train())[0]}
    found["over nf4"], expected = outcome(ours)
    found["over nf4, in PEFT"] = outcome(
        peft.PeftModel.from_pretrained(load(folder, "nf4"), adapter).train(), expected
    )[0]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", peftrs.PeftrsWarning)
            ours.merge_adapter()
        found["quantized again"] = {"told": str(caught[-1].message), **outcome(ours, expected)[0]}
        ours.unmerge_adapter()
    except peftrs.MergeError as error:
        found["quantized again"] = {"refused": str(error)}
    found["merged into the dequantized weights, bfloat16"] = outcome(
        ours.merge_and_unload(dtype=torch.bfloat16), expected
    )[0]
    over = peftrs.PeftModel.from_pretrained(load(folder, "bf16"), adapter)
    found["merged into the original weights, bfloat16"] = outcome(over.merge_and_unload(), expected)[0]
    return found


def main() -> None:
    """Runs all and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the model and adapters are written")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3, help="how many starts of the adapter over each base")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if given.child:
        name, kind, seed = given.child
        sys.stdout.write(json.dumps(child(given.folder, name, kind, int(seed), given.steps)) + "\n")
        return
    base = given.folder / "base"
    if not base.exists():
        lesson.save_base(base)
    found = [spawn(base, name, kind, 0, given.steps) for name, kind in RUNS]
    more = [
        spawn(base, "peftrs", kind, seed, given.steps)
        for seed in range(1, given.seeds)
        for kind in ("nf4", "bf16")
    ]
    for one in found + more:
        grown = ", ".join(f"{phase} {megabytes:.1f}" for phase, megabytes in one["grown"].items())
        sys.stdout.write(
            f"{one['library']:7}{one['base']:5} seed {one['seed']}: {one[SECONDS]:.2f} s of the processor a"
            f" step; allocated in a step {one[ALLOCATED]:.3f} MB; grown by MB: {grown}\n"
        )
        sys.stdout.write(f"  losses {' '.join(f'{loss:.3f}' for loss in one['losses'])}\n")
    ours, theirs, _ = found
    ratios = {
        phase: ours["grown"][phase] / theirs["grown"][phase]
        for phase in ours["grown"]
        if theirs["grown"][phase] > 1
    }
    ratios["allocated"] = ours[ALLOCATED] / theirs[ALLOCATED]
    apart = max(abs(one - other) for one, other in zip(ours["losses"], theirs["losses"], strict=True))
    slower = ours[SECONDS] / theirs[SECONDS]
    sys.stdout.write(f"ours to PEFT: memory {ratios}, seconds {slower:.2f}, losses apart by {apart:.4f}\n")
    for kind in ("nf4", "bf16"):
        last = [
            one["losses"][-1] for one in found + more if (one["library"], one["base"]) == ("peftrs", kind)
        ]
        sys.stdout.write(f"last losses over {kind}: {' '.join(f'{loss:.4f}' for loss in last)}\n")
    after = afterwards(base)
    for name, told in after.items():
        sys.stdout.write(f"{name}: {told}\n")
    if given.json:
        given.json.parent.mkdir(exist_ok=True)
        given.json.write_text(json.dumps({"runs": found + more, "afterwards": after}, indent=1) + "\n")


if __name__ == "__main__":
    main()
