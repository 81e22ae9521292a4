"""LoRA+: the factor that starts at zero learns faster than the other.

Hayou et al. 2024, https://arxiv.org/abs/2402.12354.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from peftrs.bases.kinds import LayerKind
from peftrs.core.tree import adapted_layers

EIGHT_BIT = {"Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"}


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer of the class given over all that the model trains.

    `lora_B` and vectors get the rate `lr * loraplus_lr_ratio`, what is trained of embeddings
    `loraplus_lr_embedding` (1e-6), all else `lr`. `loraplus_weight_decay` (0.0) is for matrices; other
    keyword arguments are the class's own.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    embedded = {
        id(parameter)
        for layer in adapted_layers(model)
        if layer.spec.kind is LayerKind.EMBEDDING
        for fitted in layer.adapters.values()
        for _, parameter in fitted.parameters()
    }
    normed = {
        id(parameter)
        for module in model.modules()
        if type(module).__name__.lower().endswith(("layernorm", "rmsnorm"))
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "undecayed": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embedded:
            groups["embedding"].append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            groups["undecayed" if "bias" in name or id(parameter) in normed else "B"].append(parameter)
        else:
            groups["A"].append(parameter)
    fast = lr * loraplus_lr_ratio
    options = {
        "A": (decay, lr),
        "embedding": (decay, embedding_lr),
        "B": (decay, fast),
        "undecayed": (0.0, fast),
    }
    stated = [
        {"params": groups[name], "weight_decay": own, "lr": rate} for name, (own, rate) in options.items()
    ]
    optimizer: Optimizer = cast(Any, optimizer_cls)(stated, lr=lr, **kwargs)
    if optimizer_cls.__name__ in EIGHT_BIT:
        _widen_embeddings(model, optimizer_cls)
    return optimizer


def _widen_embeddings(model: nn.Module, optimizer_cls: type[Optimizer]) -> None:
    """Has the 8-bit optimizers keep the state of embeddings in 32 bits, as their authors advise."""
    from importlib import import_module

    manager = import_module(
        f"{optimizer_cls.__module__.partition('.')[0]}.optim"
    ).GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
