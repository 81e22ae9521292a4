"""One environment without PEFT for all tests of a process."""

from pathlib import Path

import pytest

from tests.ecosystem.environment import without_peft


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with everything but PEFT."""
    return without_peft(tmp_path_factory.mktemp("without-peft"))
