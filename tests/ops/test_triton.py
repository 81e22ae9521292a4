"""Triton's kernels where there is no GPU: right in Triton's interpreter, and compiled for GPUs that are not
here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from triton import compiler
from triton.runtime.jit import JITFunction

from peftrs.ops.lora_linear import kernels, triton
from peftrs.ops.lora_linear.reference import Dropout

pytestmark = pytest.mark.skipif(
    tuple(map(int, version("triton").split(".")[:2])) < (3, 3),
    reason="Triton 3.2 interprets no loop over numpy 2's numbers",
)
CHECKS = Path(__file__).with_name("kernel_checks.py")
NAMES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
    torch.int8: "*i8",
    int: "i32", float: "fp32",
}  # fmt: skip
SHARED = 99 * 1024  # what the smallest of the devices since 8.0 lends one program


def test_they_are_right_in_the_interpreter(record_testsuite_property: Callable[[str, object], None]) -> None:
    """In a process of its own, since Triton reads the variable once, when it is imported."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(CHECKS),
    ]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CHECKS.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b\d\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout
    record_testsuite_property("Triton's kernels in the interpreter", done.stdout.splitlines()[-1])


class Launch(NamedTuple):
    """A kernel with the types of its arguments, and what is known of them when it is compiled."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]


class Gridded:
    """Takes the grid that a kernel is launched on."""

    def __init__(self, launch: Callable[..., None]) -> None:
        self.launch = launch

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(type(size) is int and size > 0 for size in grid)
        return self.launch


class Recorder:
    """Stands in for the module of kernels and keeps what would be launched, as Triton's launcher specialises
    it.
    """

    def __init__(self) -> None:
        self.launches: set[Launch] = set()

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(kernels, name)

        def launch(*arguments: Any, **settings: Any) -> None:
            known = set(kernel.arg_names)
            options = {key: value for key, value in settings.items() if key not in known}
            given = dict(zip(kernel.arg_names, arguments, strict=False)) | {
                k: v for k, v in settings.items() if k in known
            }
            given = {name: given[name] for name in kernel.arg_names}
            fixed = {
                key: value
                for key, value in given.items()
                if key in settings or value is None or (type(value) is int and value == 1)
            }
            types = {
                key: (
                    "constexpr"
                    if key in fixed
                    else NAMES[value.dtype if isinstance(value, torch.Tensor) else type(value)]
                )
                for key, value in given.items()
            }
            divisible = [
                key
                for key, value in given.items()
                if key not in fixed and (types[key][0] == "*" or (types[key] == "i32" and value % 16 == 0))
            ]
            self.launches.add(
                Launch(
                    name, tuple(types.items()), tuple(fixed.items()), tuple(divisible), tuple(options.items())
                )
            )

        return Gridded(launch)


def launches(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, wide: torch.dtype, rank: int
) -> set[Launch]:
    """All that a forward and backward pass launches, with dropout and without."""
    recorder = Recorder()
    monkeypatch.setattr(triton, "kernels", recorder)
    monkeypatch.setattr(triton, "_processors", lambda _: 132)
    rows, width, out = 4096, 4096, 14336
    with torch.device("meta"):
        x, dy, weight = (
            torch.empty(rows, width, dtype=dtype),
            torch.empty(rows, out, dtype=dtype),
            torch.empty(out, width, dtype=dtype),
        )
        down, up, bias = (
            torch.empty(rank, width, dtype=wide),
            torch.empty(out, rank, dtype=wide),
            torch.empty(out, dtype=dtype),
        )
        dropout = Dropout(6554, torch.empty(1, dtype=torch.int64))
    u = triton.low(x, down, dropout)
    triton.high(u, x, weight, bias, up, 2.0)
    triton.backward(dy, x, weight, down, up, u, 2.0, dropout, (True, True, True))
    triton.mask(rows, width, dropout)
    return recorder.launches


def built(launch: Launch, capability: int) -> Any:
    from triton.backends.compiler import GPUTarget

    kernel = getattr(kernels, launch.kernel)
    assert isinstance(kernel, JITFunction)
    at = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = compiler.ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={at[name]: value for name, value in launch.constants},
        attrs={at[name]: [["tt.divisibility", 16]] for name in launch.divisible},
    )
    return compiler.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))


def spilled(built: Any, folder: Path) -> int:
    """Bytes of a thread's own memory, where what does not fit into registers goes."""
    import triton as library

    file = folder / "kernel.cubin"
    file.write_bytes(built.asm["cubin"])
    tool = Path(library.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run(
        [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    ).stdout
    return int(re.search(r"STACK:(\d+)", told)[1])


WIDE = [(one, torch.float32) for one in triton.DTYPES]
CASES = [pytest.param(*pair, 16, id=f"{pair[0]}") for pair in WIDE]
CASES += [
    pytest.param(*pair, rank, id=f"{pair[0]}, {pair[1]}, {rank}", marks=pytest.mark.long)
    for pair in [*WIDE, (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
    for rank in (1, 32, 64, 128)
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "wide", "rank"), CASES)
def test_every_kernel_compiles_for_a_gpu_that_is_not_here(
    dtype: torch.dtype,
    wide: torch.dtype,
    rank: int,
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(
        "TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton")
    )  # cases share a few kernels
    found = launches(monkeypatch, dtype, wide, rank)
    joined = {"both"} if rank <= triton.JOINED else set()
    assert {launch.kernel for launch in found} == {"down", "up", "across", "add", "mask"} | joined
    for launch in found:
        kernel = built(launch, capability)
        assert kernel.metadata.shared <= SHARED, launch
        assert spilled(kernel, tmp_path) <= 16, launch
