"""Merging a checkpoint on disk: `peftrs-merge` beside `cp`, PEFT and a streaming script in torch; time,
memory and errors.

    python benches/merge_disk.py [--quick] [--gigabytes 2.2] [--rank 16] [--binary PATH] [--runs 5] [--folder
    DIR] [--output FILE]

The base is a synthetic Llama in bfloat16 in shards, the adapter is in float32 on all of its linear layers.
Every tool's result is held against W + s·B·A in float64, rounded once, before anything is timed. Memory is
the highest anonymous memory of the process (RssAnon, sampled every 5 ms). Dirty pages are written out before
each run, and the base is in the page cache. The wall time depends on what else the machine does, the
processor's time (of the program, and of the system for it) less so.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from run import Row, Taken, measure, options, shown, write
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HERE = Path(__file__).parent
SHARD = 500_000_000
OURS = 5
"""How many of the sides are ours or `cp`."""


def model_config(gigabytes: float) -> LlamaConfig:
    """TinyLlama's shape with as many layers as make so many gigabytes, or a narrow one below a tenth of
    that.
    """
    wide = gigabytes >= 0.3
    hidden, inner, vocabulary = (2048, 5632, 32000) if wide else (512, 1408, 4000)
    layer = 2 * hidden * hidden + 2 * hidden * hidden // 8 + 3 * hidden * inner
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / layer))
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 512,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def make_base(folder: Path, gigabytes: float) -> LlamaConfig:
    """Writes the model shard by shard, so that it may be larger than memory."""
    config = model_config(gigabytes)
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled and filled + 2 * shape.numel() > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * shape.numel()
    places = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: (torch.randn(shapes[name], dtype=torch.float32) / 50).bfloat16() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(names, file))
    index_file = {
        "metadata": {"total_size": 2 * sum(shape.numel() for shape in shapes.values())},
        "weight_map": places,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
    return config


def make_adapter(folder: Path, config: LlamaConfig, rank: int) -> None:
    """Writes an adapter on every linear layer whose change is about a hundredth of the weights."""
    folder.mkdir()
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(LINEAR),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    with torch.device("meta"):
        modules = dict(LlamaForCausalLM(config).named_modules())
    tensors = {}
    for name, module in modules.items():
        if name.endswith(LINEAR):
            key, (rows, columns) = f"base_model.model.{name}", module.weight.shape
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns) / math.sqrt(columns)
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank) / math.sqrt(rank) / 100
    save_file(tensors, folder / "adapter_model.safetensors")


PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="500MB")
"""

STREAM = """
import json, os, shutil, sys, torch
from safetensors.torch import load_file, save_file
base, adapter, out = sys.argv[1:]
config = json.load(open(f"{adapter}/adapter_config.json"))
factors, scale = load_file(f"{adapter}/adapter_model.safetensors"), config["lora_alpha"] / config["r"]
os.makedirs(out)
for file in sorted(os.listdir(base)):
    if not file.endswith(".safetensors"):
        shutil.copy(f"{base}/{file}", out)
        continue
    tensors = load_file(f"{base}/{file}")
    for name, weight in tensors.items():
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in factors:
            delta = factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
            tensors[name] = (weight.float() + scale * delta).to(weight.dtype)
    save_file(tensors, f"{out}/{file}", metadata={"format": "pt"})
"""


class Bench:
    """One base and one adapter on disk, and the ways to merge them."""

    def __init__(self, root: Path, gigabytes: float, rank: int, binary: str, mergekit: str | None) -> None:
        self.root, self.binary = root, binary
        self.base, self.adapter, self.out = root / "base", root / "adapter", root / "out"
        config = make_base(self.base, gigabytes)
        make_adapter(self.adapter, config, rank)
        self.size = sum(file.stat().st_size for file in self.base.iterdir())
        self.memory: dict[str, float] = {}
        places = map(str, (self.base, self.adapter, self.out))
        base, adapter, out = places
        script = shutil.which("peftrs-merge", path=str(Path(sys.executable).parent)) or "peftrs-merge"
        self.commands: dict[str, list[str]] = {
            "peftrs-merge --no-sync": [binary, base, adapter, "-o", out, "--no-sync", "--quiet"],
            "cp -r": ["cp", "-r", base, out],
            "peftrs-merge": [binary, base, adapter, "-o", out, "--quiet"],
            "cp -r, sync": ["sh", "-c", f"cp -r {base} {out} && sync {out}/* {out}"],
            "console script --no-sync": [script, base, adapter, "-o", out, "--no-sync", "--quiet"],
            "streaming in torch": [sys.executable, "-c", STREAM, base, adapter, out],
            "PEFT": [sys.executable, "-W", "ignore", "-c", PEFT, base, adapter, out],
        }
        if mergekit:
            recipe = root / "recipe.yml"
            recipe.write_text(
                f"models:\n  - model: {base}+{adapter}\nmerge_method: passthrough\ndtype: bfloat16\n"
            )
            self.commands["mergekit"] = [
                mergekit,
                str(recipe),
                out,
                "--lora-merge-cache",
                str(root / "cache"),
            ]

    def run(self, side: str) -> Taken:
        """One run into an empty place."""
        for folder in (self.out, self.root / "cache"):
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        start = time.perf_counter()
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(self.commands[side], stdout=subprocess.DEVNULL, stderr=said)
            ended = threading.Event()
            watcher = threading.Thread(target=self.watch, args=(side, process.pid, ended))
            watcher.start()
            _, status, used = os.wait4(process.pid, 0)
            elapsed = (time.perf_counter() - start) * 1e3
            ended.set()
            watcher.join()
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                said.seek(0)
                raise SystemExit(f"{side} failed:\n{said.read().decode()}")
        return Taken(elapsed, (used.ru_utime + used.ru_stime) * 1e3)

    def watch(self, side: str, process: int, ended: threading.Event) -> None:
        """Keeps the highest anonymous memory of a process."""
        while not ended.wait(0.005):
            self.memory[side] = max(self.memory.get(side, 0), anonymous(process) / 1e6)

    @cache  # noqa: B019 - one bench lives as long as the program
    def expected(self) -> dict[str, tuple[int, torch.Tensor]]:
        """Sixteen rows of some weights, merged in float64 and rounded once, by name with the first row's
        number.
        """
        config = json.loads((self.adapter / "adapter_config.json").read_text())
        found = {}
        with safe_open(self.adapter / "adapter_model.safetensors", "pt") as factors:
            for name in [key for key in factors.keys() if key.endswith("lora_A.weight")][::11]:  # noqa: SIM118
                down, up = (
                    factors.get_tensor(name).double(),
                    factors.get_tensor(name.replace("lora_A", "lora_B")).double(),
                )
                plain = name.removeprefix("base_model.model.").replace(".lora_A", "")
                first = (len(found) * 37) % (up.shape[0] - 16)
                rows = read(self.base, plain)[first : first + 16].double()
                change = config["lora_alpha"] / config["r"] * (up[first : first + 16] @ down)
                found[plain] = (first, (rows + change).bfloat16())
        return found

    def wrong(self) -> float:
        """The share of the sampled weights in the output that are not the correctly rounded ones."""
        total = off = 0
        for name, (first, rows) in self.expected().items():
            off += int((read(self.out, name)[first : first + 16] != rows).sum())
            total += rows.numel()
        return off / total

    def check(self, sides: tuple[str, ...]) -> dict[str, float]:
        """The share of wrong weights of every tool. Nothing is timed if one is far off."""
        shares = {}
        for side in (side for side in sides if not side.startswith("cp")):
            self.run(side)
            shares[side] = self.wrong()
            if shares[side] > 0.5:
                raise SystemExit(
                    f"{side}: {shares[side]:.2%} of the sampled weights are wrong; nothing is timed"
                )
        return shares


def anonymous(process: int) -> int:
    """Bytes of anonymous memory that a process has now; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def read(folder: Path, name: str) -> torch.Tensor:
    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(folder / file, "pt") as shard:
        return shard.get_tensor(name)


def compare(bench: Bench, name: str, sides: tuple[str, ...], runs: int) -> dict[str, Any]:
    """The result of one row, with memory and errors beside the times."""
    shares = bench.check(sides)

    def make(side: str, quick: bool) -> Callable[[], Taken]:
        return partial(bench.run, side)

    # The check has run every side once already.
    result = measure(Row(name, make, lambda _: None, sides), False, runs, warm=0)
    result |= {
        "anonymous_megabytes": {side: bench.memory.get(side, 0.0) for side in sides},
        "share_of_wrong_weights": shares,
    }
    print(shown(result))
    for side in sides:
        error = f"{shares[side]:.5%} of weights not the correctly rounded ones" if side in shares else ""
        print(f"  {side:<28} {bench.memory.get(side, 0.0):10.1f} MB anonymous  {error}", flush=True)
    return result


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--gigabytes",
        type=float,
        nargs="+",
        default=[2.2],
        help="sizes of the base; others than the first: ours and cp",
    )
    parser.add_argument(
        "--rank",
        type=int,
        nargs="+",
        default=[16, 64],
        help="ranks; others than the first with the first size",
    )
    parser.add_argument("--sides", nargs="+", help="the only ones to measure, of those printed")
    parser.add_argument(
        "--binary", default="peftrs-merge", help="the tool built by cargo [default: what PATH has]"
    )
    parser.add_argument(
        "--mergekit", help="the `mergekit-yaml` of an environment that has it, to measure it too"
    )
    parser.add_argument("--folder", help="where to work [default: the system's temporary folder]")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.gigabytes, arguments.rank = [0.03], [16]
    binary = shutil.which(arguments.binary) or shutil.which(
        arguments.binary, path=str(Path(sys.executable).parent)
    )
    if binary is None:
        raise SystemExit(
            f"there is no {arguments.binary}; build it with `cargo build --release -p peftrs-cli` and name it"
            " by --binary"
        )
    results = []
    for gigabytes in arguments.gigabytes:
        for rank in arguments.rank if gigabytes == arguments.gigabytes[0] else arguments.rank[:1]:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
                bench = Bench(Path(root), gigabytes, rank, str(Path(binary).absolute()), arguments.mergekit)
                first = (gigabytes, rank) == (arguments.gigabytes[0], arguments.rank[0])
                every = tuple(arguments.sides or (bench.commands if first else list(bench.commands)[:OURS]))
                name = f"merge {bench.size / 1e9:.2f} GB of bfloat16, rank {rank}"
                results.append(compare(bench, name, every, arguments.runs or (1 if arguments.quick else 5)))
    write(arguments.output, results, os.cpu_count() or 1)


if __name__ == "__main__":
    main()
