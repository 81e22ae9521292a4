"""`python -m peftrs.compat PROGRAM`: the program is as it would be alone, except that `import peft` gives
peftrs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, multiprocessing
def ask(queue):
    import peft
    queue.put(peft.__spec__.origin)
if __name__ == "__main__":
    import peft
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=ask, args=(queue,))
    child.start()
    print(sys.argv[1:], peft.__spec__.origin, queue.get(timeout=60), "torch" in sys.modules, sys.path[0],
    __file__, __spec__)
    child.join()
    print([entry for entry in sys.path if entry.endswith("startup")])
    sys.exit(5)
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_script_has_its_arguments_its_exit_code_and_its_children(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = python(tmp_path, "-m", "peftrs.compat", str(script), "--lr", "1")
    assert done.returncode == 5, done.stderr
    told, startup = done.stdout.splitlines()
    assert told == f"['--lr', '1'] peftrs peftrs False {tmp_path} {script} None"
    assert startup == "[]"


def test_a_module_and_code_run_too(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(
        "import peft, sys\nprint(peft.__version__, sys.argv[1:], __spec__.name)\n"
    )
    assert (
        python(tmp_path, "-m", "peftrs.compat", "-m", "package", "x").stdout
        == "0.21.2 ['x'] package.__main__\n"
    )
    assert (
        python(tmp_path, "-um", "peftrs.compat", "-c", "import peft; print(peft)").stdout
        == "<module 'peft' (peftrs)>\n"
    )


def test_options_of_the_interpreter_are_kept(tmp_path: Path) -> None:
    code = "import sys; print(sys.flags.safe_path, sys.warnoptions, sys.flags.utf8_mode)"
    for module in (["-m", "peftrs.compat"], ["-mpeftrs.compat"]):
        assert (
            python(tmp_path, "-P", "-X", "utf8", "-W", "error", *module, "-c", code).stdout
            == "True ['error'] 1\n"
        )


def test_a_traceback_is_the_programs_own(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import peft\n1 / 0\n")
    done = python(tmp_path, "-m", "peftrs.compat", "program.py")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[1].endswith('program.py", line 2, in <module>')
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "peftrs" not in done.stderr


@pytest.mark.parametrize("options", [["-I"], ["-S"], ["-E"]])
def test_an_interpreter_without_start_up_code_is_told(tmp_path: Path, options: list[str]) -> None:
    home = Path(__import__("peftrs").__file__).parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(home)!r}); from peftrs.compat.__main__ import main;"
        " main(['x.py'])"
    )
    done = python(tmp_path, *options, "-c", code)
    assert done.returncode == 2
    assert "cannot work under -E, -I or -S" in done.stderr


def test_without_a_program_the_usage_is_shown(tmp_path: Path) -> None:
    assert python(tmp_path, "-m", "peftrs.compat").returncode == 2
    done = python(tmp_path, "-m", "peftrs.compat", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m peftrs.compat SCRIPT|-m MODULE")
