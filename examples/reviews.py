"""Movie-review snippets with a human rating each, from the source distribution of vaderSentiment (MIT
licence).

Hutto and Gilbert (ICWSM 2014) had at least twenty people rate each of 10,605 snippets from -4 to 4. The sign
of the mean is the label here: 1 for positive, 0 for negative; the few means of exactly zero are left out.
"""

import hashlib
import io
import tarfile
from pathlib import Path
from typing import NamedTuple

INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
TEST_SHARE = 0.25


class Review(NamedTuple):
    """One snippet."""

    text: str
    label: int


def member(archive: bytes, name: str) -> bytes:
    """The bytes of one file of a gzipped tar archive."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        found = opened.extractfile(name)
        if found is None:
            raise FileNotFoundError(f"{name} is not a file of the archive")
        return found.read()


def is_test(text: str) -> bool:
    """Whether a snippet belongs to the test part: decided by its text alone, so the split never changes."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < TEST_SHARE


def load(distribution: Path) -> tuple[list[Review], list[Review]]:
    """The training and the test snippets in the source distribution at `distribution`."""
    lines = member(member(distribution.read_bytes(), INNER), SNIPPETS).decode("utf-8").splitlines()
    rated = (line.split("\t") for line in lines if line)
    reviews = [
        Review(text.strip(), int(float(rating) > 0)) for _, rating, text in rated if float(rating) != 0
    ]
    return [each for each in reviews if not is_test(each.text)], [
        each for each in reviews if is_test(each.text)
    ]
