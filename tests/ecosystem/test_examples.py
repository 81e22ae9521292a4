"""The examples run as a user runs them, where PEFT is not installed: few steps of tiny models."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ecosystem.environment import CHECKOUT, installed, run

LIBRARIES = {
    "transformers": "5",
    "accelerate": "1.6",
    "diffusers": "0.33",
    "trl": "1",
    "sentence-transformers": "6",
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_example(
    library: str, interpreter: Path, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    record_property("ecosystem", f"{library} {installed(library, LIBRARIES[library])}")
    script = CHECKOUT / "examples" / f"with_{library.replace('-', '_')}.py"
    began = time.monotonic()
    done = run(interpreter, str(script), "--steps", "2", "--output", "out", folder=tmp_path)
    record_property(script.name, time.monotonic() - began)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    apart = re.findall(r"at most (\S+) apart", done.stdout)
    assert apart, done.stdout
    assert all(float(one) < 1e-4 for one in apart), done.stdout
