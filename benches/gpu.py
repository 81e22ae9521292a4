"""Everything that needs a GPU, in one command: the kernels against float64, then the layers, then every bench
of training.

    python benches/gpu.py [--quick] [--results FOLDER]

Results go to a JSON file a bench, named after the device. Ends with 2 where there is no GPU, with 1 where
something is wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
CHECKS = ("tests/ops/kernel_checks.py", "tests/ops/test_gpu.py")
BENCHES = ("skinny.py", "train_linear.py", "train_layer.py", "train_step.py")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything still runs")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"no GPU here: torch {torch.__version__} finds no CUDA device, so nothing was checked and nothing"
            " was timed"
        )
        return 2
    device = torch.cuda.get_device_name()
    print(
        f"{device}, compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}, torch"
        f" {torch.__version__}",
        flush=True,
    )
    # The library's own products repeat to the bit only with a workspace of fixed size.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", *CHECKS], cwd=HERE.parent, env=environment
    )
    if done.returncode:
        print("the checks failed: nothing is timed")
        return 1
    arguments.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for bench in BENCHES:
        if not (HERE / bench).exists():
            continue
        name = re.sub(r"\W+", "-", f"{Path(bench).stem}-{device}").lower()
        command = [
            sys.executable,
            HERE / bench,
            "--output",
            arguments.results / f"{name}.json",
            *(["--quick"] if arguments.quick else []),
        ]
        print(f"\n{bench}", flush=True)
        failed += [bench] if subprocess.run(command).returncode else []
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
