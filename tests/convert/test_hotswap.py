"""Hot-swapping gives what loading anew gives, leaves other adapters alone, and compiles nothing anew once it
is warm.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftrs
from peftrs import AdapterError, CheckpointError, LoraConfig
from peftrs.compat.helpers import rescale_adapter_scale
from peftrs.convert.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from tests.model.tiny import fingerprint, shake

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Linear layers, a grouped convolution and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.convolution = nn.Conv2d(4, 4, 3, groups=2)
        self.table = nn.Embedding(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        x = x + self.table(torch.arange(4)) + self.convolution(IMAGE).mean()
        return self.head(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


EVERY = ["layers.0", "layers.1", "layers.2", "convolution", "table"]
CONFIGS: dict[str, dict[str, Any]] = {
    "whole": {"r": 8, "lora_alpha": 4, "target_modules": EVERY},
    "higher": {"r": 16, "lora_alpha": 8, "target_modules": EVERY},
    "subset": {"r": 4, "lora_alpha": 12, "target_modules": ["layers.1", "table"]},
    "patterns": {
        "r": 8, "lora_alpha": 4, "target_modules": EVERY, "rank_pattern": {"layers.0": 2, "^layers.1": 16},
        "alpha_pattern": {"layers.2": 32, "convolution": 1},
    },
    "rslora": {"r": 4, "lora_alpha": 4, "target_modules": EVERY, "use_rslora": True},
    "pattern as text": {"r": 6, "lora_alpha": 3, "target_modules": r"layers\.[02]|convolution"},
    "head": {"r": 4, "lora_alpha": 4, "target_modules": ["layers.0"], "modules_to_save": ["head"]},
    "pissa": {"r": 4, "lora_alpha": 4, "target_modules": ["layers.0", "layers.1"],
    "init_lora_weights": "pissa"},
}  # fmt: skip
PADDED = [name for name in CONFIGS if name not in ("head", "pissa")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(CONFIGS.items()):
        model = peftrs.get_peft_model(net(), LoraConfig(**copy.deepcopy(settings)))
        shake(model, seed)
        model.save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


def fresh(folder: Path) -> Any:
    return peftrs.PeftModel.from_pretrained(net(), folder)


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def saved_alike(model: Any, folder: Path) -> None:
    """What is saved gives the same on a fresh model, and its config is that of its tensors."""
    model.save_pretrained(folder)
    close(out(fresh(folder)), out(model))


@pytest.mark.parametrize("first", ["whole", "subset"])
def test_each_swap_gives_what_loading_gives(first: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = fresh(folders[first])
    for name, folder in folders.items():
        hotswap_adapter(model, str(folder), "default")
        assert torch.equal(out(model), out(fresh(folder))), name
        assert model.active_adapters == ["default"]
        assert model.peft_config["default"].r == CONFIGS[name]["r"]
        assert not any(parameter.requires_grad for parameter in model.parameters())
        saved_alike(model, tmp_path / name)
    hotswap_adapter(model, str(folders["subset"]), "default")
    model.merge_adapter()
    close(out(model), out(fresh(folders["subset"])))


def test_others_stay_as_they_are_to_the_bit(folders: dict[str, Path]) -> None:
    model = fresh(folders["whole"])
    model.load_adapter(folders["higher"], "foo")
    model.load_adapter(folders["patterns"], "foobar")
    model.set_adapter("foobar")
    expected, before = (
        out(model),
        {name: one for name, one in fingerprint(model).items() if "foo." not in f"{name}."},
    )
    for name in ("subset", "rslora", "whole"):
        hotswap_adapter(model, str(folders[name]), "foo")
        assert {name: one for name, one in fingerprint(model).items() if "foo." not in f"{name}."} == before
        assert torch.equal(out(model), expected)
    model.set_adapter("foo")
    assert torch.equal(out(model), out(fresh(folders["whole"])))


def test_training_goes_on_after_a_swap(folders: dict[str, Path]) -> None:
    model = peftrs.PeftModel.from_pretrained(net(), folders["whole"], is_trainable=True)
    hotswap_adapter(model, str(folders["higher"]), "default")
    model(X).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


def test_what_does_not_fit_changes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    model = fresh(folders["whole"])
    before, names = fingerprint(model), [name for name, _ in model.named_modules()]
    broken = tmp_path / "broken"
    other = fresh(folders["higher"])
    other.peft_config["default"].r = 4
    other.save_pretrained(broken)
    with pytest.raises(CheckpointError, match="another shape"):
        hotswap_adapter(model, str(broken), "default")
    with pytest.raises(AdapterError, match="nobody not found"):
        hotswap_adapter(model, str(folders["higher"]), "nobody")
    peftrs.get_peft_model(
        net(), peftrs.IA3Config(target_modules=["layers.0"], feedforward_modules=[])
    ).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="Incompatible PEFT types found: LORA and IA3"):
        hotswap_adapter(model, str(tmp_path), "default")
    with pytest.raises(AdapterError, match="use_dora"):
        check_hotswap_configs_compatible(LoraConfig(), LoraConfig(use_dora=True))
    assert fingerprint(model) == before
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.peft_config) == ["default"]
    model = fresh(folders["subset"])
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge it first"):
        hotswap_adapter(model, str(folders["higher"]), "default")


def test_tensors_by_their_names_in_the_model(folders: dict[str, Path]) -> None:
    for name in ("higher", "subset", "patterns"):
        other = fresh(folders[name])
        state = {key: value.clone() for key, value in other.state_dict().items() if "lora_" in key}
        model = fresh(folders["whole"])
        hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
        assert torch.equal(out(model), out(other))


@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6 compiles once more where ranks differ by layer"
)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["module", "in place"])
def test_nothing_is_compiled_anew(kind: str, backend: str, folders: dict[str, Path], tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = fresh(folders["whole"])
    before = out(model)
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    close(out(model), before)
    saved_alike(model, tmp_path / "prepared")
    compiled: Any = model
    if kind == "module":
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    else:
        model.compile(backend=backend, fullgraph=True)
    close(out(compiled), before)
    warm = counters["stats"]["unique_graphs"]
    assert warm
    for name in [*PADDED, *PADDED[::-1]]:
        hotswap_adapter(compiled, str(folders[name]), "default")
        close(out(compiled), out(fresh(folders[name])))
        assert counters["stats"]["unique_graphs"] == warm, name
        saved_alike(model, tmp_path / name)
    assert model.peft_config["default"].r == 16


def test_a_prepared_model_is_merged_and_scaled_as_any(folders: dict[str, Path]) -> None:
    model, plain = fresh(folders["subset"]), fresh(folders["subset"])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    for one in (model, plain):
        one.get_submodule("base_model.model.layers.1").set_scale("default", 0.5)
    close(out(model), out(plain))
    with rescale_adapter_scale(model, 2.0), rescale_adapter_scale(plain, 2.0):
        close(out(model), out(plain))
    weights = [parameter.clone() for parameter in model.parameters()]
    model.merge_adapter()
    close(out(model), out(plain))
    model.unmerge_adapter()
    assert all(torch.equal(one, other) for one, other in zip(weights, model.parameters(), strict=True))


def test_a_compiled_model_says_what_it_lacks(folders: dict[str, Path]) -> None:
    model = fresh(folders["subset"])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = fingerprint(model)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(
        AdapterError, match=r"layers\.0 has no such adapter.*load the adapter with the most layers first"
    ):
        hotswap_adapter(compiled, str(folders["whole"]), "default")
    assert fingerprint(model) == before
    model = fresh(folders["whole"])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    with pytest.raises(AdapterError, match=r"lora_A.weight has shape \[8, 8\], it has \[16, 8\]"):
        hotswap_adapter(model, str(folders["higher"]), "default")
    with pytest.raises(AdapterError, match="before"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.raises(AdapterError, match="has rank 8"):
        prepare_model_for_compiled_hotswap(fresh(folders["whole"]), target_rank=4)
    with pytest.raises(AdapterError, match="No adapter layers"):
        prepare_model_for_compiled_hotswap(net())
    other = LoraConfig(r=2, rank_pattern={"x": 4})
    prepare_model_for_compiled_hotswap(fresh(folders["whole"]), target_rank=8, config={"other": other})
    assert (other.r, other.rank_pattern) == (8, {"x": 8})
