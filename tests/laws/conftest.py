"""Makes `laws.cases` importable: tests are imported by file, which puts no folder of theirs on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
