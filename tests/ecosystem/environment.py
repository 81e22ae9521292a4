"""An environment with everything that is installed here but PEFT: what a user has who installed peftrs in its
place.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.version import Version

CHECKOUT = Path(__file__).resolve().parents[2]
LEFT_OUT = ("peft", "bitsandbytes", "hqq", "torchao")
"""PEFT, and the libraries whose import takes seconds and which none of these checks is about."""


def without_peft(folder: Path) -> Path:
    """Makes the environment in `folder`; returns its interpreter."""
    venv.EnvBuilder(symlinks=True).create(folder)
    packages = next(folder.glob("lib*/python*/site-packages"))
    for source in map(Path, sys.path):
        if source.name in ("site-packages", "dist-packages") or (source / "peftrs").is_dir():
            for entry in source.iterdir():
                name = entry.name.partition("-")[0].lower()
                link = packages / entry.name
                if name not in LEFT_OUT and entry.suffix != ".pth" and not link.is_symlink():
                    link.symlink_to(entry)
    return folder / "bin" / "python"


def run(
    interpreter: Path, *arguments: str, folder: Path, timeout: int = 900
) -> subprocess.CompletedProcess[str]:
    """Runs the interpreter with nothing of this one's paths but the checkout, for the tests' own modules."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))
    }
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [str(interpreter), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def installed(library: str, oldest: str) -> str:
    """The library's version.

    Skips where it is not installed, or is older than what is asked of it is written for.
    """
    try:
        held = version(library)
    except PackageNotFoundError:
        pytest.skip(f"{library} is not installed")
    if Version(held) < Version(oldest):
        pytest.skip(f"{library} {held} is older than {oldest}")
    return held
