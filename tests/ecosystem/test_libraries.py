"""Libraries that import `peft` run on peftrs alone, in an environment in which PEFT is not installed.

The checks of one library run in one process, under `python -m peftrs.compat -m pytest`: they are ordinary
tests, in `checks/`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.ecosystem.environment import CHECKOUT, installed, run

LIBRARIES = {
    "transformers": "4.51",
    "accelerate": "1.6",
    "diffusers": "0.33",
    "trl": "1",
    "sentence-transformers": "6",
}
"""The oldest version that a library's checks are written for."""


def test_peft_is_not_there(interpreter: Path, tmp_path: Path) -> None:
    done = run(interpreter, "-c", "import peftrs, torch; import peft", folder=tmp_path)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'peft'"
    done = run(
        interpreter,
        "-c",
        "from importlib.metadata import version; import peftrs; version('peft')",
        folder=tmp_path,
    )
    assert "PackageNotFoundError: No package metadata was found for peft" in done.stderr


@pytest.mark.parametrize("library", LIBRARIES)
def test_library(
    library: str, interpreter: Path, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    held = installed(library, LIBRARIES[library])
    report = tmp_path / "report.xml"
    done = checks(interpreter, library, report)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    record_property("ecosystem", f"{library} {held}")
    for case in cases:
        skipped = case.find("skipped") is not None
        record_property(str(case.get("name")), "skipped" if skipped else float(case.get("time", "0")))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert cases


def checks(interpreter: Path, library: str, report: Path) -> subprocess.CompletedProcess[str]:
    program = [
        "-m",
        "pytest",
        f"tests/ecosystem/checks/with_{library.replace('-', '_')}.py",
        f"--junitxml={report}",
    ]
    # Whose warnings they are decides: those of peftrs are errors, the libraries' own are theirs.
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "filterwarnings=ignore",
        "-W",
        "error::peftrs.PeftrsWarning",
    ]
    return run(interpreter, "-P", "-m", "peftrs.compat", *program, *options, folder=CHECKOUT)
