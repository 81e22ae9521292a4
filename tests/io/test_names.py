"""The public names are the same for people, for programs and for type checkers."""

from __future__ import annotations

import ast
from pathlib import Path

import peftrs


def test_type_checkers_see_every_public_name_where_it_is() -> None:
    stub = Path(str(peftrs.__file__)).with_suffix(".pyi")
    found = {
        alias.asname: node.module
        for node in ast.walk(ast.parse(stub.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {name: f"peftrs.{module}" for module, names in peftrs._MODULES.items() for name in names}
    assert found == homes | {"__version__": "peftrs._native"}
    assert set(found) == set(peftrs.__all__)
