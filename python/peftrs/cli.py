"""The console scripts."""

import sys

from peftrs._native import merge_main


def merge() -> int:
    """Runs `peftrs-merge` on the command line's arguments and returns its exit code."""
    return merge_main(sys.argv[1:])
