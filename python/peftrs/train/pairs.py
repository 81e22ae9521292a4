"""The two factors of every LoRA in a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peftrs.core.slots import FittedAdapter
from peftrs.core.tree import adapted_layers

MATRICES = ("lora_A.weight", "lora_B.weight")
TABLES = ("lora_embedding_A", "lora_embedding_B")


def pairs(model: nn.Module, *, tables: bool) -> Iterator[tuple[FittedAdapter, nn.Parameter, nn.Parameter]]:
    """Each adapter of a layer with matrices `A (r, in)` and `B (out, r)`, trained or not; those of embeddings
    too with `tables`.
    """
    for layer in adapted_layers(model):
        for fitted in layer.adapters.values():
            held = dict(fitted.parameters())
            for down, up in (MATRICES, TABLES) if tables else (MATRICES,):
                if down in held and held[down].ndim == held[up].ndim == 2 and not fitted.spec.stacked:
                    yield fitted, held[down], held[up]


def inverse(gram: Tensor, damping: float) -> Tensor:
    """`(G + damping·I)⁻¹` of a symmetric `(r, r)` matrix; its pseudo-inverse where that has no inverse."""
    found: Tensor = torch.linalg.pinv(
        gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), hermitian=True
    )
    return found
