"""What holds in every process of these checks: PEFT is not there, and who asks for it gets peftrs."""

import importlib.util
from importlib.machinery import PathFinder
from importlib.metadata import DistributionFinder, MetadataPathFinder, version

import pytest


@pytest.fixture(scope="session", autouse=True)
def peft_is_absent() -> None:
    """Fails everything where the real library, or its metadata, could be found."""
    assert PathFinder.find_spec("peft") is None
    assert not list(MetadataPathFinder.find_distributions(DistributionFinder.Context(name="peft")))
    spec = importlib.util.find_spec("peft")
    assert spec is not None
    assert spec.origin == "peftrs"
    assert version("peft") == "0.21.2"
