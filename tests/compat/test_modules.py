"""The alias has PEFT's modules, and its layer classes tell layers apart as PEFT's do."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from torch import nn

import peftrs
from peftrs.compat.finder import Alias, Finder
from peftrs.compat.layers import layer_class
from peftrs.compat.names import METHODS, MODULES, NAMES
from peftrs.compat.other import factorization, fsdp_auto_wrap_policy
from peftrs.errors import PeftrsError
from tests.model.tiny import llama

INNER = {
    "adalora.gptq", "adamss.asa_callback", "adamss.utils", "adaption_prompt.utils", "boft.fbd", "c3a.utils",
    "cartridge.utils",
    "osf.utils", "poly.router", "shadow.diffusion_models", "shadow.layers", "shira.mask_functions",
    "waveft.constants",
    "waveft.wavelet", "waveft.waverec2d", "xlora.classifier",
}  # fmt: skip
"""Files that hold nothing but parts of one method's arithmetic."""


def modules(package: ModuleType) -> Iterator[str]:
    yield "peft"
    yield from (
        found.name for found in pkgutil.walk_packages(package.__path__, "peft.", onerror=lambda _: None)
    )


@pytest.mark.filterwarnings("ignore")
def test_every_module_of_peft_can_be_imported() -> None:
    missing = set(modules(peft)) - MODULES
    assert missing == {f"peft.tuners.{name}" for name in INNER}
    finder = Finder()
    assert all(finder.find_spec(name) is not None for name in MODULES)
    assert finder.find_spec("peft.nonsense") is None
    assert finder.find_spec("torch") is None


def test_every_name_of_the_table_is_there() -> None:
    for name, where in NAMES.items():
        module, _, attribute = where.partition(":")
        assert hasattr(importlib.import_module(module), attribute), name


def imported(library: str) -> Iterator[tuple[str, str, str]]:
    """Every name that a library's sources import from `peft`: its module, the name, and the file."""
    spec = importlib.util.find_spec(library)
    folders = [] if spec is None else spec.submodule_search_locations or []
    for path in (path for folder in folders for path in Path(folder).rglob("*.py")):
        source = path.read_bytes()
        if b"from peft" in source:
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "peft":
                    yield from ((str(node.module), alias.name, path.name) for alias in node.names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "library", ["transformers", "accelerate", "diffusers", "trl", "sentence_transformers"]
)
def test_every_name_that_a_library_imports_is_there(library: str) -> None:
    found = set(imported(library))
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    missing = [
        (module, name, file)
        for module, name, file in sorted(found)
        if module not in MODULES
        or (f"{module}.{name}" not in MODULES and getattr(Alias(module), name, None) is None)
    ]
    assert missing == []


def test_layer_classes_carry_pefts_names() -> None:
    for folder in METHODS:
        try:
            theirs = importlib.import_module(f"peft.tuners.{folder}.layer")
        except ModuleNotFoundError:
            continue
        layer = next(
            (name for name in vars(theirs) if name.lower() == f"{folder.replace('_', '')}layer"), None
        )
        if layer is not None:
            assert layer_class(folder, layer) is not None, (folder, layer)


def test_numbers_fall_apart_as_in_peft() -> None:
    from peft.tuners.lokr.layer import factorization as theirs

    for dimension in range(1, 200):
        for factor in (-1, 2, 3, 4, 7, 8, 16, 64):
            assert factorization(dimension, factor) == theirs(dimension, factor), (dimension, factor)


def test_the_units_of_fsdp_are_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peftrs.get_peft_model(llama(), peftrs.LoraConfig(target_modules=["q_proj"]))
    policy = fsdp_auto_wrap_policy(model)
    units = [
        name
        for name, module in model.named_modules()
        if policy(module=module, recurse=False, nonwrapped_numel=1)
    ]
    assert units == [f"base_model.model.model.layers.{layer}" for layer in range(2)]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,Nothing")
    with pytest.raises(peftrs.ConfigError, match="'Nothing'"):
        fsdp_auto_wrap_policy(model)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.lin = nn.Linear(8, 8)
        self.conv = nn.Conv2d(3, 4, 3)


def test_layers_are_what_pefts_classes_say() -> None:
    lora = peftrs.get_peft_model(
        Net(), peftrs.LoraConfig(target_modules=["embed", "lin", "conv"], r=4, lora_alpha=6)
    )
    net = lora.base_model.model
    for name, kind in (("embed", "Embedding"), ("lin", "Linear"), ("conv", "Conv2d")):
        layer = getattr(net, name)
        for other in ("Embedding", "Linear", "Conv2d", "Conv3d", "Linear4bit"):
            assert isinstance(layer, layer_class("lora", other)) is (other == kind)  # type: ignore[arg-type]
        assert isinstance(layer, layer_class("lora", "LoraLayer"))  # type: ignore[arg-type]
        assert not isinstance(layer, layer_class("ia3", "IA3Layer"))  # type: ignore[arg-type]
        assert not isinstance(layer.base_layer, layer_class("lora", "LoraLayer"))  # type: ignore[arg-type]
    assert layer_class("lora", "nonsense") is None
    assert issubclass(layer_class("lora", "Linear"), layer_class("lora", "LoraLayer"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="get_peft_model"):
        layer_class("lora", "Linear")(nn.Linear(2, 2), "default")  # type: ignore[misc]
    ia3 = peftrs.get_peft_model(Net(), peftrs.IA3Config(target_modules=["lin"], feedforward_modules=[]))
    assert isinstance(ia3.base_model.model.lin, layer_class("ia3", "Linear"))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_layers_show_what_code_reads_off_them() -> None:
    settings = {
        "target_modules": ["lin", "conv", "embed"],
        "r": 4,
        "lora_alpha": 6,
        "init_lora_weights": False,
    }
    ours = peftrs.get_peft_model(Net(), peftrs.LoraConfig(**settings), "one").base_model.model
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(**settings), "one").base_model.model
    for name in ("lin", "conv", "embed"):
        own, real = getattr(ours, name), getattr(theirs, name)
        for attribute in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora"):
            assert dict(getattr(own, attribute)) == dict(getattr(real, attribute)), attribute
        for attribute in (
            "merged", "merged_adapters", "active_adapter", "active_adapters", "disable_adapters",
        ):  # fmt: skip
            assert getattr(own, attribute) == getattr(real, attribute), attribute
        assert type(own.get_base_layer()) is type(real.get_base_layer())
        assert own.weight.shape == real.weight.shape
    for attribute in ("in_features", "out_features", "fan_in_fan_out"):
        assert getattr(ours.lin, attribute) == getattr(theirs.lin, attribute)
    assert ours.lin.lora_A["one"].weight.shape == theirs.lin.lora_A["one"].weight.shape
    assert ours.conv.lora_B["one"].weight.shape == theirs.conv.lora_B["one"].weight.shape
    assert ours.embed.lora_embedding_A["one"].shape == theirs.embed.lora_embedding_A["one"].shape
    x = torch.randn(2, 8)
    ours.eval()
    with torch.no_grad():
        change = (
            ours.lin.lora_B["one"](ours.lin.lora_A["one"](ours.lin.lora_dropout["one"](x)))
            * ours.lin.scaling["one"]
        )
        assert torch.allclose(ours.lin(x), ours.lin.base_layer(x) + change, atol=1e-6)


def test_installing_is_refused_while_peft_is_imported() -> None:
    with pytest.raises(PeftrsError, match="before anything that imports it"):
        __import__("peftrs.compat", fromlist=["install"]).install()
