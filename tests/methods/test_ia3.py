"""What is particular to IA³: which side a layer is scaled on, and that a factor of zero is no trap."""

import pytest
import torch
from torch import nn

from peftrs.core import manage
from peftrs.core.tree import adapted_layers
from peftrs.errors import ConfigError
from peftrs.methods.ia3 import IA3Config
from tests.laws.cases import add, bits, fitted, same


def test_feedforward_modules_are_scaled_on_their_inputs_and_others_on_their_outputs() -> None:
    model = nn.ModuleDict({"up": nn.Linear(3, 5), "down": nn.Linear(5, 3), "conv": nn.Conv3d(2, 4, 1)})
    add(model, IA3Config(target_modules=["up", "down", "conv"], feedforward_modules=["down", "conv"]), "a")
    shapes = {adapter.spec.name: tuple(adapter["ia3_l"].shape) for adapter in fitted(model)}
    assert shapes == {"up": (5, 1), "down": (1, 5), "conv": (1, 2, 1, 1, 1)}


def test_a_factor_of_zero_is_merged_and_taken_out_again() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    before = bits(model)
    add(model, IA3Config(target_modules=["0"], feedforward_modules=[]), "a")
    (adapter,) = fitted(model)
    with torch.no_grad():
        adapter["ia3_l"].zero_()
    manage.merge(model)
    assert not model(torch.randn(2, 3)).any()
    manage.unmerge(list(adapted_layers(model)))
    assert same(bits(model), before)


def test_feedforward_modules_must_be_targets() -> None:
    with pytest.raises(ConfigError, match="2 of `feedforward_modules` are not among `target_modules`"):
        IA3Config(target_modules=["q", "v"], feedforward_modules=["v", "z", "w"])
