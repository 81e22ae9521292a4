"""What training an adapter takes of memory, told from a checkpoint's headers and configs alone.

The model's class is built without values, gets the adapter, and goes once forward and backward through one
batch: every operation says what it would allocate, and autograd keeps what it would keep. So nothing is known
of any architecture here.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftrs.config import PeftConfig, TargetedConfig
from peftrs.core.inject import base_parameters
from peftrs.core.tree import places, users_model
from peftrs.errors import CheckpointError, ConfigError
from peftrs.io.checkpoint import FileSource
from peftrs.model.create import get_peft_model
from peftrs.planning.outline import built
from peftrs.planning.settle import output_layers

STATES: dict[str, Callable[[Tensor], float]] = {
    "sgd": lambda _: 0,
    "adamw": lambda one: 2 * one.nbytes,
    "lion": lambda one: one.nbytes,
    # Tensors below 4,096 elements keep 32 bits; the others a byte an element and a scale for each 256.
    "adamw8bit": lambda one: 2 * _eight_bits(one),
    "lion8bit": lambda one: _eight_bits(one),
    "adafactor": lambda one: (
        4 * (sum(one.shape[-2:]) * math.prod(one.shape[:-2]) if one.ndim > 1 else one.numel())
    ),
}
"""Bytes that each optimizer keeps for a tensor that it trains."""

BLOCK, NESTED = 64, 256
"""How many values share a scale in bitsandbytes' 4-bit weights, and how many scales one of the second
level.
"""

QUANTIZED: dict[str, Callable[[Tensor], float]] = {
    "nf4": lambda one: one.numel() / 2 + 4 * math.ceil(one.numel() / BLOCK),
    "fp4": lambda one: one.numel() / 2 + 4 * math.ceil(one.numel() / BLOCK),
    "nf4-double": lambda one: (
        one.numel() / 2 + math.ceil(one.numel() / BLOCK) + 4 * math.ceil(one.numel() / BLOCK / NESTED)
    ),
    "int8": lambda one: one.numel() + 4 * one.shape[0],
}
"""Bytes of a linear layer's weight in each form."""


def _eight_bits(one: Tensor) -> float:
    return one.numel() + 4 * math.ceil(one.numel() / 256) if one.numel() >= 4096 else 4 * one.numel()


def plan(
    model: str | os.PathLike[str],
    config: str | os.PathLike[str],
    batch: int,
    seq: int,
    quant: str | None = None,
    optimizer: str = "adamw",
) -> dict[str, Any]:
    """Bytes that training takes: of weights, adapter, gradients, optimizer and activations, these also under
    checkpointing.

    `model` is a folder with `config.json` and safetensors files, of which headers are read; `config` an
    adapter's config or its folder. `batch` rows have `seq` tokens. Raises `CheckpointError` for a model that
    transformers cannot build, `ConfigError` for an unknown `quant` or `optimizer`, and what adding the
    adapter raises.
    """
    if optimizer not in STATES or (quant is not None and quant not in QUANTIZED):
        raise ConfigError(f"quant is one of {', '.join(QUANTIZED)}, optimizer one of {', '.join(STATES)}")
    path = os.fspath(config)
    settings = PeftConfig.from_pretrained(os.path.dirname(path) or "." if os.path.isfile(path) else path)
    settings.inference_mode = False
    # Its mask is made again from a seed, not kept, which tensors without values cannot show.
    settings.lora_dropout = 0.0
    found: dict[str, Any] = {"batch": batch, "seq": seq, "quant": quant, "optimizer": optimizer}
    base = built(model, _dtype(model))
    with torch.device("meta"):
        found["weights"] = _weights(base, quant)
        adapted = get_peft_model(base, cast(TargetedConfig, settings), low_cpu_mem_usage=True).train()
        trained = [one for one in adapted.parameters() if one.requires_grad]
        found["adapter"] = found["gradients"] = sum(one.nbytes for one in trained)
        found["optimizer_states"] = math.ceil(sum(STATES[optimizer](one) for one in trained))
        for name, checkpointed in (("", False), ("_checkpointed", True)):
            if checkpointed:
                if not getattr(adapted, "supports_gradient_checkpointing", False):
                    continue
                adapted.gradient_checkpointing_enable({"use_reentrant": False})
            peak = step_peak(adapted, batch, seq)
            found[f"activations{name}"] = max(peak - found["gradients"], 0)
            found[f"total{name}"] = (
                found["weights"]
                + found["adapter"]
                + found["optimizer_states"]
                + max(peak, found["gradients"])
            )
    found["optimizer_name"], found["optimizer"] = optimizer, found.pop("optimizer_states")
    return found


def step_peak(model: nn.Module, batch: int, seq: int) -> int:
    """The most bytes that one step forward and backward holds at once beside the model: activations,
    gradients, passing tensors.
    """
    with Live() as live, _attending():
        loss_of(model, torch.zeros(batch, seq, dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
    for one in model.parameters():
        one.grad = None
    return int(live.peak)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """A loss over a batch: the model's own where it predicts the tokens themselves, else the mean of what it
    gives first.
    """
    kind = type(users_model(model)).__name__
    if kind.endswith(("CausalLM", "LMHeadModel", "MaskedLM")):
        return cast(Tensor, model(input_ids=tokens, labels=tokens).loss)
    return cast(Tensor, model(input_ids=tokens)[0].float().mean())


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows which storages exist that were allocated inside the `with`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage())
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # Models ask whether all rows are without padding, say: they are.
            return True if args[0].dtype is torch.bool else 0
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out

    def _freed(self, count: int) -> None:
        self.bytes -= count


@contextmanager
def _attending() -> Iterator[None]:
    """Attention without values keeps what a fused kernel keeps, not the matrix of scores that torch composes
    it of.
    """
    fused, composed = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        functional.scaled_dot_product_attention,
    )

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p:
            # Not every device has a fused kernel with dropout; the CPU has none.
            return composed(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        return cast(
            Tensor, fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        )

    # Nor does torch know of autocast on a device without values: models may only turn it off here.
    off = mock.patch.multiple(
        torch, is_autocast_enabled=lambda *_: False, autocast=lambda *_, **__: nullcontext()
    )
    with mock.patch.object(functional, "scaled_dot_product_attention", attend), off:
        yield


def _dtype(model: str | os.PathLike[str]) -> torch.dtype:
    """The dtype of most of a checkpoint's bytes."""
    sizes: Counter[torch.dtype] = Counter()
    for dtype, shape in FileSource(os.fspath(model), model=True).described().values():
        sizes[dtype] += dtype.itemsize * math.prod(shape)
    found = next((dtype for dtype, _ in sizes.most_common() if dtype.is_floating_point), None)
    if found is None:
        raise CheckpointError(
            f"{os.fspath(model)}: holds no floats; give the unquantized model, and how to quantize it"
        )
    return found


def _weights(model: nn.Module, quant: str | None) -> int:
    """Bytes of the parameters and buffers, linear layers but the output quantized."""
    found = list(places(model))
    outputs = output_layers(model, found, "CAUSAL_LM")
    held = {id(one): one.nbytes for one in (*base_parameters(model, found), *model.buffers())}
    if quant is not None:
        for place in found:
            if isinstance(place.module, nn.Linear) and place.name not in outputs:
                held[id(place.module.weight)] = math.ceil(QUANTIZED[quant](place.module.weight))
    return sum(held.values())
