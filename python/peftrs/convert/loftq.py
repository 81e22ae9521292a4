"""First values for the LoRAs of a quantized model that make up for what quantizing lost, from the checkpoint
it came from.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftrs.core.layer import AdaptedLayer
from peftrs.core.slots import FittedAdapter
from peftrs.core.tree import users_model, wrappers
from peftrs.errors import AdapterError, CheckpointError, joined, listed
from peftrs.io.checkpoint import PREFIX, FileSource
from peftrs.methods.lora.inits.loftq import factors

PLAIN = ("LORA", "DORA")


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Gives the LoRAs over quantized layers, of any format, the best approximation of what quantizing took
    from the weights.

    That is one round of LoftQ (https://arxiv.org/abs/2310.08659): `s·B·A ≈ W - Q`, of the layer's rank, with
    `W` read from the unquantized checkpoint at `model_path`, a folder or a safetensors file, by default where
    the model was loaded from. With `callback(model, layer's name)`, called after each layer in turn, a layer
    for which it returns False gets its values back. Raises `AdapterError` for a model without such layers,
    `CheckpointError` for a checkpoint that lacks some or has other shapes, with nothing changed.
    """
    model = users_model(peft_model)
    held = _held(model, adapter_name)
    path = (
        model_path if model_path is not None else getattr(getattr(model, "config", None), "_name_or_path", "")
    )
    if not path or not os.path.exists(path):
        raise CheckpointError(
            f"{os.fspath(path)!r} is no checkpoint here; hint: model_path= names the unquantized model's"
            " folder"
        )
    source = FileSource(os.fspath(path), model=True)
    names = _names(source, held, getattr(model, "base_model_prefix", ""))
    for name, fitted in held.items():
        weight = source.read(names[name]).float()
        base = fitted.frozen.base.dense(fitted.frozen.module).weight
        before = {slot: fitted[slot].clone() for slot in ("lora_A.weight", "lora_B.weight")}
        _fill(fitted, factors(weight.to(base.device) - base.float(), fitted))
        if callback is not None and not callback(peft_model, name):
            _fill(fitted, before)


def _held(model: nn.Module, adapter: str) -> dict[str, FittedAdapter]:
    """The adapter on each quantized layer, by the layer's name."""
    layers = {
        name: layer
        for name, layer in wrappers(model)
        if isinstance(layer, AdaptedLayer) and layer.base.quantized
    }
    held = {name: layer.adapters[adapter] for name, layer in layers.items() if adapter in layer.adapters}
    if not held:
        raise AdapterError(f"adapter {adapter!r} has no LoRA over a quantized layer of this model")
    if merged := [name for name in held if layers[name].merged]:
        raise AdapterError(f"{listed(merged)} are merged; unmerge them first")
    if other := [name for name, fitted in held.items() if fitted.method.name not in PLAIN]:
        raise AdapterError(
            f"{listed(other)}: {held[other[0]].method.name} has no factors to start from a residual"
        )
    return held


def _names(source: FileSource, held: dict[str, FittedAdapter], prefix: str) -> dict[str, str]:
    """The name in the checkpoint of each layer's weight: its own, or with or without what the model's class
    puts before it.
    """
    there = source.described()
    found, lost = {}, []
    for name, fitted in held.items():
        plain = f"{name}.weight".removeprefix(PREFIX)
        spellings = (plain, plain.removeprefix(f"{prefix}."), f"{prefix}.{plain}")
        own = next((one for one in spellings if one in there), None)
        if own is None:
            lost.append(f"{plain} is not there")
        elif there[own][1] != fitted.spec.shape:
            lost.append(f"{own} has the shape {there[own][1]}, not {fitted.spec.shape}")
        else:
            found[name] = own
    if lost:
        raise CheckpointError(f"{source.origin}: {joined(lost)}")
    return found


def _fill(fitted: FittedAdapter, values: dict[str, Tensor]) -> None:
    for slot, value in values.items():
        fitted[slot].copy_(value)
