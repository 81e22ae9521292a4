"""The package as it is installed: a wheel outside the sources, one version everywhere, light to import."""

import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import peftrs
from peftrs import _native

CHECKOUT = Path(__file__).resolve().parents[1]


def fresh(program: str) -> str:
    """What `program` prints in a new interpreter in which warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", [peftrs, _native], ids=["package", "extension"])
def test_what_is_tested_is_the_installed_wheel(module: object) -> None:
    file = Path(str(module.__file__)).resolve()  # type: ignore[attr-defined]
    assert not file.is_relative_to(CHECKOUT / "python"), (
        f"{file} is a source of the checkout; use `make test`"
    )


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    workspace = tomllib.loads((CHECKOUT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    assert {project, workspace, _native.__version__, metadata.version("peftrs"), peftrs.__version__} == {
        project
    }


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    loaded = fresh(
        "import sys, peftrs; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    ).split()
    assert "peftrs" in loaded
    assert {"torch", "transformers", "numpy", "peft"}.isdisjoint(loaded)


def test_every_public_name_can_be_had() -> None:
    assert len(peftrs.__all__) == len(set(peftrs.__all__)) > 0
    missing = [name for name in peftrs.__all__ if not hasattr(peftrs, name)]
    assert not missing
    assert set(peftrs.__all__) <= set(dir(peftrs))


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = peftrs.no_such_name  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["peftrs-merge", "peftrs"])
def test_the_console_scripts_explain_themselves(name: str) -> None:
    script = Path(sysconfig.get_path("scripts")) / name
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"Usage: {name} " in done.stdout
    assert not done.stderr
