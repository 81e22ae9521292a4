"""Start-up code that `python -m peftrs.compat` puts on the path of the program it runs: installs the alias,
then steps aside.
"""

import sys
from importlib import import_module
from pathlib import Path


def _start() -> None:
    here = Path(__file__).parent.resolve()
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != here]
    own = sys.modules.pop(__name__)
    try:
        from peftrs.compat import install
    except ImportError:
        pass  # another environment, started from the program, in which peftrs is not installed
    else:
        install()
    try:
        import_module("sitecustomize")  # the one that this one hid
    except ImportError:
        sys.modules[__name__] = own


_start()
