"""Any adapter as a LoRA: the best approximation of low rank of what it changes in each layer."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from peftrs.bases.kinds import Affine
from peftrs.config import PeftConfig
from peftrs.convert import changes as low_rank
from peftrs.convert.changes import Change
from peftrs.convert.combine import Factors, approximated
from peftrs.core import merge as merging
from peftrs.core.inject import activation, adapters
from peftrs.core.manage import check_known, delete_adapter, progress
from peftrs.core.slots import FittedAdapter
from peftrs.core.tree import adapted_layers, users_model
from peftrs.errors import AdapterError, joined
from peftrs.io.checkpoint import PREFIX, write
from peftrs.io.state import get_peft_model_state_dict
from peftrs.methods.lora import LoraConfig
from peftrs.planning.attach import peft_configs


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and tensors, as files have them, of a LoRA that changes the model's layers nearly as the
    adapter does.

    `rank` is each layer's rank (less where the layer has less), or as a float the part of `‖change‖²` that
    each layer's rank has to keep. Scaling is 1; biases that change are kept exactly (`lora_bias`), and so are
    modules trained whole. Also takes apart what is no sum of changes, as DoRA's. `compile_kwargs` has no
    effect. The model is left as it is.

    Raises `AdapterError` for an unknown adapter, a rank that cannot be, or layers whose change is none of
    their weight.
    """
    inner = users_model(model)
    energy = check_rank(rank)
    check_known(inner, [adapter_name])
    config = peft_configs(inner)[adapter_name]
    held = [layer.adapters[adapter_name] for layer in adapted_layers(inner) if adapter_name in layer.adapters]
    if faults := _faults(held, config):
        raise AdapterError(joined(faults, 4))
    with torch.no_grad():
        own = [fitted for fitted in held if not fitted.shares]
        chosen = progress(own, "Converting") if progressbar else own
        changes = [_change(fitted, int(rank) if energy is None else None, energy) for fitted in chosen]
    name, other = _free_name(inner), low_rank.config_like(config)
    state = activation(inner)
    active = state.active
    low_rank.add(inner, name, other, changes, [adapter_name])
    try:
        tensors = get_peft_model_state_dict(inner, adapter_name=name, save_embedding_layers=False)
    finally:
        del peft_configs(inner)[name]
        delete_adapter(inner, name)
        state.switch(active=active)
    return other, {PREFIX + key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> None:
    """Writes what `convert_to_lora` returns into a folder, which it makes."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config.inference_mode = True
    write(path, config.to_json(), tensors, {})


def supports(model: nn.Module, adapter_name: str) -> bool:
    """Whether `convert_to_lora` can take the adapter. Raises `AdapterError` for an unknown one."""
    check_known(model, [adapter_name])
    held = [layer.adapters[adapter_name] for layer in adapted_layers(model) if adapter_name in layer.adapters]
    return not _faults(held, peft_configs(model)[adapter_name])


def check_rank(rank: int | float) -> float | None:
    """The energy to keep that a rank stands for, None for a whole number.

    Raises `AdapterError` for what is neither.
    """
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise AdapterError(
                f"rank={rank}: as a float it is the part of the energy to keep, above 0 and up to 1"
            )
        return rank
    if rank < 1:
        raise AdapterError(
            f"rank={rank} must be a positive integer, or a float: the part of the energy to keep"
        )
    return None


def _faults(held: list[FittedAdapter], config: PeftConfig) -> list[str]:
    faults = []
    if config.bias != "none":
        faults.append(f"bias={config.bias!r} trains biases of the base, which a LoRA's change does not hold")
    for fitted in held:
        if fitted.method.unfactored is not None:
            faults.append(f"{fitted.spec.name}: {fitted.method.unfactored}")
        elif fitted.spec.groups > 1:
            faults.append(
                f"{fitted.spec.name}: a LoRA over {fitted.spec.groups} groups of channels reaches across them"
            )
    if not held:
        faults.append("the adapter changes no layer")
    return faults


def _change(fitted: FittedAdapter, rank: int | None, energy: float | None) -> Change:
    change, bias = _difference(fitted)
    term, _ = approximated(change, rank, energy)
    return Change(fitted.spec, term, bias)


def _difference(fitted: FittedAdapter) -> tuple[Tensor | Factors, Tensor | None]:
    """What an adapter alone changes in the weight, as factors if it has them, else as a matrix; and in the
    bias.
    """
    method, frozen = fitted.method, fitted.frozen
    if (term := method.term(fitted)) is not None:
        return (term.up, term.down * term.scale), None if term.shift is None else term.shift * term.scale
    weight, *rest = (tensor.detach().double() for tensor in merging.originals(frozen))
    before = Affine(weight.mT if frozen.base.transposed else weight, rest[0] if rest else None)
    after = method.apply(fitted, before)
    delta = (after.weight - before.weight).float()
    change = delta if fitted.spec.stacked else delta.flatten(1)
    if (
        before.bias is None
        or after.bias is None
        or torch.equal(before.bias, after.bias.to(before.bias.dtype))
    ):
        return change, None
    return change, (after.bias - before.bias).float()


def _free_name(model: nn.Module) -> str:
    known = adapters(model)
    return next(name for index in range(len(known) + 1) if (name := f"as_lora_{index}") not in known)
