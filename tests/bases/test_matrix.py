"""The printed matrix: no cell of ours is wrong."""

import logging

import pytest

import peftrs
from tests.bases.matrix import BASES, METHODS, WRONG, rows


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BASES)
def test_no_cell_is_wrong(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    (methods,) = rows([name], list(METHODS), {"peftrs": peftrs}, None).values()
    cells = {
        (method, step): cell for method, libs in methods.items() for step, cell in libs["peftrs"].items()
    }
    assert {key: reason for key, (mark, reason) in cells.items() if mark == WRONG} == {}
