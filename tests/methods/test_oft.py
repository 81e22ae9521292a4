"""What is particular to OFT: its blocks, their bounds, and what may be left out of a training step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftrs.config import PeftConfig
from peftrs.errors import ConfigError, PeftrsWarning
from peftrs.methods.oft import OFTConfig
from tests.laws.cases import add, distance, fitted, stir


def turned(x: torch.Tensor, **settings: object) -> tuple[nn.Module, torch.Tensor]:
    """A model that is the identity but for its adapter, and its output: the turned input."""
    model = nn.Sequential(nn.Linear(x.shape[-1], x.shape[-1], bias=False))
    nn.init.eye_(model[0].weight)
    add(model, OFTConfig(target_modules=["0"], init_weights=False, **settings), "a")
    return model, model.eval()(x)


def test_cayleys_map_keeps_lengths_and_its_series_nearly() -> None:
    x = torch.randn(7, 24)
    errors = []
    for settings in (
        {"use_cayley_neumann": False},
        {"num_cayley_neumann_terms": 12},
        {"num_cayley_neumann_terms": 5},
    ):
        torch.manual_seed(1)
        errors.append(distance(turned(x, oft_block_size=4, **settings)[1].norm(dim=1), x.norm(dim=1)))
    assert max(errors[:2]) < 1e-6 < errors[2] < 0.02


def test_the_series_is_the_inverse_of_what_the_solved_map_gives() -> None:
    x = torch.randn(7, 24)
    model, forth = turned(x, oft_block_size=4, use_cayley_neumann=False)
    back = turned(x, oft_block_size=4, num_cayley_neumann_terms=30)[0]
    back.load_state_dict(model.state_dict())
    assert distance(back(forth), x) < 1e-6


@pytest.mark.parametrize("shared", [True, False])
def test_constrained_blocks_keep_within_their_bounds_in_every_step(shared: bool) -> None:
    model, _ = turned(torch.randn(3, 8), oft_block_size=4, coft=True, eps=0.1, block_share=shared)
    (adapter,) = fitted(model)
    weight, bound = adapter["oft_R.weight"], 0.1 / (1 if shared else 2**0.5)
    assert (2**0.5 * weight.norm(dim=1)).min() > bound
    x = torch.randn(5, 8)
    within = model(x)
    stored = weight.detach().clone()
    assert torch.equal(weight, stored), "outside of training nothing is written"
    model.train()
    assert distance(model(x), within) < 1e-6
    assert torch.allclose(2**0.5 * weight.norm(dim=1), torch.tensor(bound))
    weight.requires_grad_(False).mul_(3)
    assert distance(model(x), within) < 1e-6
    assert (2**0.5 * weight.norm(dim=1)).min() > bound, "a frozen adapter is not written to"


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(8, 8), lambda: nn.Embedding(5, 8), lambda: nn.Conv2d(2, 4, 2)]
)
def test_module_dropout_leaves_out_whole_blocks_in_training_alone(make) -> None:
    model = nn.Sequential(make())
    x = {nn.Linear: torch.randn(3, 8), nn.Embedding: torch.arange(5), nn.Conv2d: torch.randn(3, 2, 3, 3)}[
        type(model[0])
    ]
    bare = model(x)
    add(model, OFTConfig(target_modules=["0"], oft_block_size=2, module_dropout=1.0), "a")
    stir(model)
    assert distance(model.eval()(x), bare) > 0.1
    assert distance(model.train()(x), bare) < 1e-6
    (adapter,) = fitted(model)
    adapter.config.module_dropout = 0.5
    torch.manual_seed(0)
    blocks = adapter.method.blocks(adapter, torch.float32, training=True)
    assert sum(torch.equal(block, torch.eye(2)) for block in blocks) == 2


def test_sizes_that_do_not_divide_give_way_to_the_nearest_that_does() -> None:
    model = nn.Sequential(nn.Linear(12, 3))
    with pytest.warns(PeftrsWarning, match="oft_block_size=5 does not divide 12 features; 4 is used") as told:
        add(model, OFTConfig(target_modules=["0"], oft_block_size=5), "a")
    assert len(told) == 1
    assert (model[0].r["a"], model[0].oft_block_size["a"]) == (3, 4)
    with pytest.warns(PeftrsWarning, match="r=40 does not divide 12 features; 12 is used"):
        add(model, OFTConfig(target_modules=["0"], r=40, oft_block_size=0), "b")
    assert (model[0].r["b"], model[0].oft_block_size["b"]) == (12, 1)


def test_a_config_tells_all_its_faults_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"`r` is 4 and `oft_block_size` 32.*`module_dropout` is 2.*`bias` is \"some\""
    ):
        OFTConfig(r=4, bias="some", module_dropout=2)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"oft_block_size": None}, "has no `oft_block_size`"),
        ({"use_cayley_neumann": None}, "has no `use_cayley_neumann`"),
        ({"peft_version": "0.17.1"}, "`peft_version` is 0.17.1 and not 0.18"),
        ({"peft_version": None}, "`peft_version` is None and not 0.18"),
        ({"peft_version": "0.17.1", "use_cayley_neumann": False}, None),
        ({"peft_version": "0.18.0.dev0@abc"}, None),
    ],
)
def test_files_whose_turn_nobody_can_tell_are_refused(
    tmp_path: Path, change: dict[str, Any], fault: str | None
) -> None:
    values = json.loads(OFTConfig(target_modules=["0"]).to_json()) | change
    text = json.dumps(
        {name: value for name, value in values.items() if value is not None or name == "layers_pattern"}
    )
    (tmp_path / "adapter_config.json").write_text(text)
    if fault is None:
        assert OFTConfig.from_pretrained(tmp_path).oft_block_size == 32
    else:
        with pytest.raises(ConfigError, match=fault):
            PeftConfig.from_pretrained(tmp_path)


def test_grouped_convolutions_are_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ConfigError, match=r"0: .*2 groups"):
        add(model, OFTConfig(target_modules=["0"], oft_block_size=2), "a")
    assert isinstance(model[0], nn.Conv2d)
