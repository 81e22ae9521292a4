"""What peftrs declares that it needs is all that it needs: no numpy, which torch does not require, and no
transformers.
"""

import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file

import peftrs
from tests.declared_alone import METHODS, Base
from tests.ecosystem.environment import run

PROGRAM = Path(__file__).with_name("declared_alone.py")
SCRIPT = (
    "from importlib.metadata import distribution;"
    " exit(distribution('peftrs').entry_points['peftrs-merge'].load()())"
)


def required() -> set[str]:
    """The distributions that an installer brings with peftrs, itself included, on a machine like this one."""
    found: dict[str, set[str]] = {}
    waiting = [Requirement("peftrs")]
    while waiting:
        one = waiting.pop()
        extras = found.get(canonicalize_name(one.name))
        if extras is not None and one.extras <= extras:
            continue
        extras = found.setdefault(canonicalize_name(one.name), set())
        extras |= one.extras
        contexts = [{"extra": extra} for extra in ("", *extras)]
        needed = map(Requirement, distribution(one.name).requires or ())
        waiting += [
            other for other in needed if other.marker is None or any(map(other.marker.evaluate, contexts))
        ]
    return set(found)


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with links to the files of these alone."""
    folder = tmp_path_factory.mktemp("declared")
    venv.EnvBuilder(symlinks=True).create(folder)
    packages = next(folder.glob("lib*/python*/site-packages"))
    for name in sorted(required()):
        held = distribution(name)
        for top in {file.parts[0] for file in held.files or ()} - {"..", "__pycache__"}:
            if not top.endswith(".pth") and not (packages / top).exists():
                (packages / top).symlink_to(str(held.locate_file(top)))
    # Where peftrs is linked for work on itself, its distribution does not list its files.
    if not (packages / "peftrs").exists():
        (packages / "peftrs").symlink_to(Path(peftrs.__file__).parent)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def folder(interpreter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and what the program made of it in that environment."""
    made = tmp_path_factory.mktemp("used")
    torch.manual_seed(0)
    state = Base().state_dict()
    torch.save(state, made / "base.pt")
    (made / "base").mkdir()
    save_file(state, made / "base" / "model.safetensors")
    done = run(interpreter, "-P", "-W", "error::peftrs.PeftrsWarning", str(PROGRAM), str(made), folder=made)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {canonicalize_name(name) for name in (made / "distributions").read_text().split()} == required()
    return made


@pytest.mark.parametrize("method", METHODS)
def test_declared_dependencies_are_enough_to_train_save_load_and_merge(
    method: str, interpreter: Path, folder: Path
) -> None:
    done = run(
        interpreter, "-P", "-c", SCRIPT, "base", method, "-o", f"{method}-merged", "--quiet", folder=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    base, merged = (torch.load(folder / f"{name}.pt") for name in ("base", method))
    written = load_file(folder / f"{method}-merged" / "model.safetensors")
    assert merged.keys() == written.keys() == base.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-5, atol=1e-6)
    assert not torch.equal(written["up.weight"], base["up.weight"])
