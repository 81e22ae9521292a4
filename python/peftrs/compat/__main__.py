"""`python -m peftrs.compat SCRIPT|-m MODULE|-c CODE ...`: runs a program for which `import peft` gives
peftrs.

The program takes this process over: arguments, `__main__`, exit code and tracebacks are its own, and the
Python processes that it starts see peftrs too, since they inherit the folder of start-up code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

USAGE = """usage: python -m peftrs.compat SCRIPT|-m MODULE|-c CODE [ARGUMENT ...]

Runs a program for which `import peft` gives peftrs, whether or not PEFT is installed."""

STARTUP = Path(__file__).with_name("startup")
"""The folder whose `sitecustomize` installs the alias when an interpreter starts."""


def main(arguments: Sequence[str]) -> NoReturn:
    """Becomes the program, or exits with 2 where there is none to run."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stderr if not arguments else sys.stdout)
        sys.exit(0 if arguments else 2)
    if sys.flags.ignore_environment or sys.flags.no_site:
        text = "python -m peftrs.compat cannot work under -E, -I or -S, which keep start-up code away"
        print(text, file=sys.stderr)  # noqa: T201
        sys.exit(2)
    before = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    # What is left ends as in "-X dev -um peftrs.compat" or "-mpeftrs.compat": the module goes, the options
    # stay.
    last = before.pop()
    letters = before.pop() if last == __package__ else last.removesuffix(str(__package__))
    options = before[1:] + ([letters[:-1]] if len(letters) > 2 else [])
    others = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(STARTUP), *([others] if others else [])])}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *options, *arguments], environment)


if __name__ == "__main__":
    main(sys.argv[1:])
