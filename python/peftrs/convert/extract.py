"""The adapter between two models: LoRA factors of what training, merging or mixing changed, layer by layer.

Tensors are read one layer at a time, from memory or from checkpoints on disk, so that no more than a few
layers are held.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftrs.convert import changes as low_rank
from peftrs.convert.as_lora import check_rank
from peftrs.convert.changes import Change
from peftrs.convert.combine import approximated
from peftrs.core.replace import ReplacedModule
from peftrs.core.target import Target
from peftrs.core.tree import Wrapped, original, wrappers
from peftrs.errors import AdapterError, CheckpointError, ConfigError, PeftrsWarning, joined, listed
from peftrs.io.card import CARD_NAME, card
from peftrs.io.checkpoint import PREFIX, FileSource, MemorySource, Source, write
from peftrs.io.state import get_peft_model_state_dict
from peftrs.methods.lora import LoraConfig
from peftrs.planning import skeleton
from peftrs.planning.settle import make_plan
from peftrs.registry import method

NAME = "extracted"
LARGEST = 2**16
"""The largest rank that a config may have, for where an energy decides."""


@dataclass(frozen=True)
class Kept:
    """What became of one layer's change: its rank, `‖change‖`, and the part of `‖change‖²` that the adapter
    has.
    """

    name: str
    rank: int
    norm: float
    energy: float


@dataclass(frozen=True)
class Extraction:
    """An adapter, its tensors by the names that files have, and how much of the difference it holds.

    `whole` are the modules kept as they are, `left` the tensors that differ and are in neither the layers nor
    those modules.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    layers: list[Kept]
    whole: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def energy(self) -> float:
        """The part of all layers' `‖change‖²` that the adapter has, from 0 to 1."""
        total = sum(layer.norm**2 for layer in self.layers)
        return sum(layer.energy * layer.norm**2 for layer in self.layers) / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        layers = [
            {"name": one.name, "rank": one.rank, "norm": one.norm, "energy": one.energy}
            for one in self.layers
        ]
        return {"energy": self.energy, "layers": layers, "whole": self.whole, "left": self.left}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the adapter into a folder, all or nothing, as PEFT and peftrs load it."""
        self.config.inference_mode = True
        base = self.config.base_model_name_or_path or ""
        text = card(None, base=base, methods=["LORA"], tags=["lora"], pipeline=None)
        write(folder, self.config.to_json(), self.tensors, {CARD_NAME: text.encode()})


def extract_lora(
    merged: nn.Module, base: nn.Module, config: LoraConfig, energy: float | None = None
) -> Extraction:
    """The LoRA that turns `base` nearly into `merged`, two models of one architecture, which stay as they
    are.

    The config's targets, excluded modules, rank and rank pattern say which layers get which rank; with
    `energy` each gets the smallest rank, up to that, which keeps this part of `‖change‖²`. Biases of these
    layers and the config's `modules_to_save` are kept exactly, modules of vectors alone (norms) that changed
    too. Layers that did not change are left out.

    Raises `AdapterError` where the models do not fit each other or are the same, `ConfigError` or
    `TargetError` for the config; warns of tensors that differ and that the adapter does not hold.
    """
    held = [name for name, model in (("merged", merged), ("base", base)) if any(wrappers(model))]
    if held:
        raise AdapterError(f"{listed(held)} has adapters in it; hint: merge_and_unload or unload it first")
    if energy is not None:
        check_rank(float(energy))
    after, before = (
        MemorySource(model.state_dict(), name) for name, model in (("merged", merged), ("base", base))
    )
    return _extracted(skeleton.of_model(base), _Differences(after, before), config, energy)


def extract(
    base: str | os.PathLike[str],
    merged: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rank: int | float = 16,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    fan_in_fan_out: bool | None = None,
    overwrite: bool = False,
) -> Extraction:
    """The same from two checkpoints (folders or safetensors files) without loading the models; writes the
    adapter into `out`.

    `rank` may be a float, the part of each layer's `‖change‖²` to keep. `fan_in_fan_out` says that linear
    weights are stored `(in, out)`, by default as the model type in `config.json` has it. Raises as
    `extract_lora` does, and `CheckpointError` or `StorageError` for what cannot be read or written; `out` is
    written last and as a whole.
    """
    energy = check_rank(rank)
    target = os.fspath(out)
    if not overwrite and any(
        os.path.exists(os.path.join(target, name)) for name in ("adapter_config.json", CARD_NAME)
    ):
        raise AdapterError(
            f"{target}: holds an adapter or a model already; hint: choose another folder or overwrite it"
        )
    after, before = (FileSource(os.fspath(path), model=True) for path in (merged, base))
    settings = skeleton.read_settings(os.fspath(base))
    config = LoraConfig(
        r=LARGEST if energy is not None else int(rank),
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        exclude_modules=(
            exclude_modules
            if exclude_modules is None or isinstance(exclude_modules, str)
            else list(exclude_modules)
        ),
        modules_to_save=None if modules_to_save is None else list(modules_to_save),
        base_model_name_or_path=os.fspath(base),
    )
    model = skeleton.of_checkpoint(before, settings, fan_in_fan_out)
    with warnings.catch_warnings():
        # The config is ours: that its orientation is set to the layers' is no news.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set", PeftrsWarning)
        found = _extracted(model, _Differences(after, before), config, energy)
    found.save(target)
    return found


@dataclass
class _Differences:
    """The tensors of two models, and which of those that differ have been seen to."""

    merged: Source
    base: Source
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.shapes = [source.described() for source in (self.merged, self.base)]

    def fault(self, name: str) -> str | None:
        """Why a tensor has no difference, if so."""
        shapes = [list(shape[name][1]) if name in shape else None for shape in self.shapes]
        if shapes[0] == shapes[1]:
            return None
        return (
            f"{name}: has shape {shapes[1]} in {self.base.origin} and {shapes[0] or 'is not there'} in"
            f" {self.merged.origin}"
        )

    def delta(self, name: str) -> Tensor | None:
        """The difference of one tensor in float32 or wider, None where there is none.

        Raises `AdapterError` for NaN or infinity.
        """
        self.done.add(name)
        after, before = self._values(name)
        if after.dtype == before.dtype and torch.equal(after, before):
            return None
        wide = torch.promote_types(torch.promote_types(after.dtype, before.dtype), torch.float32)
        delta = after.to(wide) - before.to(wide)
        if not bool(delta.isfinite().all()):
            raise AdapterError(
                f"{name}: holds NaN or infinite values in {self.merged.origin} or {self.base.origin}"
            )
        return delta if bool(delta.any()) else None

    def rest(self) -> Iterator[str]:
        """The other tensors of the base that differ or are missing, and those that only the merged model
        has.
        """
        merged, base = self.shapes
        for name in base:
            if name in self.done:
                continue
            if self.fault(name) is not None:
                yield name
                continue
            after, before = self._values(name)
            if not torch.equal(after.to(before.dtype), before):
                yield name
        yield from (name for name in merged if name not in base)

    def _values(self, name: str) -> tuple[Tensor, Tensor]:
        before = self.base.read(name)
        return self.merged.read(name).to(before.device), before


def _extracted(
    model: nn.Module, differences: _Differences, config: LoraConfig, energy: float | None
) -> Extraction:
    merged, base = differences.merged, differences.base
    if config.use_dora:
        raise ConfigError("`use_dora`: the difference of two models is a sum, which plain LoRA holds")
    config = low_rank.config_like(config)
    lora = method("LORA")
    plan, settled = make_plan(model, config, lora)
    config.fan_in_fan_out = settled.get("fan_in_fan_out", config.fan_in_fan_out)
    targets = [target for target in plan.targets if target.spec.tied is None]
    _check(targets, differences)
    changes, kept = [], []
    with torch.no_grad():
        for target in targets:
            found = _change(target, differences, target.values["r"], energy)
            if found is not None:
                changes.append(found[0])
                kept.append(found[1])
    if not changes:
        raise AdapterError(f"{merged.origin}: none of the {len(targets)} layers differs from {base.origin}")
    differences.done |= {name for target in plan.targets for name in _tensors(target)}
    whole = {place.name: original(place.module) for place, _ in plan.saved}
    differences.done |= {f"{path}.{name}" for path, module in whole.items() for name in module.state_dict()}
    left = list(differences.rest())
    norms = _vectors(model, left, differences)
    left = [name for name in left if name.rpartition(".")[0] not in norms]
    config.modules_to_save = [*whole, *norms] or None
    low_rank.add(model, NAME, config, changes)
    _fill_replaced(model, merged)
    tensors = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    if left:
        text = f"{len(left)} tensors differ and are not in the adapter: {listed(left, 4)}"
        warnings.warn(
            f"{text}; hint: name their modules in target_modules or modules_to_save",
            PeftrsWarning,
            stacklevel=3,
        )
    return Extraction(
        config,
        {PREFIX + key: tensor for key, tensor in tensors.items()},
        kept,
        sorted({*whole, *norms}),
        left,
    )


def _tensors(target: Target) -> list[str]:
    """The names of a target's weight and, if it has one, bias, below the target's own place even where they
    are shared.
    """
    module = original(target.place.module)
    held = target.base.parameters(module)
    own = module.named_parameters(recurse=False)
    return [f"{target.place.name}.{name}" for name, tensor in own if any(tensor is other for other in held)]


def _check(targets: list[Target], differences: _Differences) -> None:
    faults = [fault for target in targets for name in _tensors(target) if (fault := differences.fault(name))]
    faults += [
        f"{one.spec.name}: a LoRA over {one.spec.groups} groups reaches across them"
        for one in targets
        if one.spec.groups > 1
    ]
    if faults:
        raise CheckpointError(f"{joined(faults, 4)}; hint: exclude these layers")


def _change(
    target: Target, differences: _Differences, rank: int, energy: float | None
) -> tuple[Change, Kept] | None:
    """The change of one layer as a term of low rank, None if it is none."""
    delta, bias, *_ = (*(differences.delta(name) for name in _tensors(target)), None)
    if delta is None and bias is None:
        return None
    spec = target.spec
    if delta is None:
        delta = torch.zeros(spec.shape)
    elif target.base.transposed:
        delta = delta.mT
    norm = float(delta.double().norm())
    term, part = approximated(delta if spec.stacked else delta.flatten(1), rank, energy)
    return Change(spec, term, bias), Kept(spec.name, int(term[0].shape[-1]), norm, part)


def _vectors(model: nn.Module, left: list[str], differences: _Differences) -> list[str]:
    """The modules among those of these tensors that hold vectors alone and fit both models."""
    found = dict.fromkeys(name.rpartition(".")[0] for name in left)
    present = {name for name in model.state_dict() if differences.fault(name) is None}
    fitting = []
    for path in found:
        module = None if not path or isinstance(held := _module(model, path), Wrapped | None) else held
        own = {} if module is None else module.state_dict()
        if own and all(tensor.ndim == 1 and f"{path}.{name}" in present for name, tensor in own.items()):
            fitting.append(path)
    return fitting


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _fill_replaced(model: nn.Module, merged: Source) -> None:
    for _, wrapper in wrappers(model):
        if isinstance(wrapper, ReplacedModule) and NAME in wrapper.modules_to_save:
            module = wrapper.modules_to_save[NAME]
            values = {name: merged.read(f"{wrapper.name}.{name}") for name in module.state_dict()}
            module.load_state_dict(values, assign=True)
