"""Attention as decoders of transformers have it: a module over projections, which only methods of attention
itself change.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base
from peftrs.bases.kinds import Affine, LayerKind


class SelfAttention(Base):
    """Attention with projections of its own for queries, keys and values (Llama), or a joint one (GPT-2).

    The affine map that it presents is its output projection, which says its width, dtype and device. Heads
    are `(batch, heads, tokens, head size)`.
    """

    kind = LayerKind.SELF_ATTENTION
    first = "hidden_states"

    def __init__(self, output: str, *, joint: bool) -> None:
        self.output = output
        self.joint = joint
        self.transposed = joint

    def parameters(self, module: Any) -> tuple[nn.Parameter, nn.Parameter | None]:
        projection, base = self._projection(module)
        return base.parameters(projection)

    def shape(self, module: Any) -> tuple[int, ...]:
        projection, base = self._projection(module)
        return base.shape(projection)

    def _projection(self, module: Any) -> tuple[nn.Module, Base]:
        """The output projection, below what adapts it, and its base: it may be quantized."""
        from peftrs.bases.resolve import resolve

        projection = getattr(module, self.output)
        while "base_layer" in projection._modules:
            projection = projection.base_layer
        return projection, cast(Base, resolve(projection))

    def op(
        self, module: nn.Module, x: Any, affine: Affine, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        raise NotImplementedError("attention has no other weights to run with")

    def queries(self, module: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
        """The queries of the module's input, turned by their positions where the model does that."""
        if self.joint:
            return self._heads(module, module.c_attn(x).chunk(3, dim=-1)[0])
        states = self._heads(module, module.q_proj(x))
        cos, sin = (part.unsqueeze(1) for part in options["position_embeddings"])
        first, second = states.chunk(2, dim=-1)
        turned: Tensor = states * cos + torch.cat((-second, first), dim=-1) * sin
        return turned

    def keys_and_values(self, module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of other input, without positions, repeated for every head."""
        if self.joint:
            _, keys, values = module.c_attn(x).chunk(3, dim=-1)
            return self._heads(module, keys), self._heads(module, values)
        keys, values = (self._heads(module, project(x)) for project in (module.k_proj, module.v_proj))
        groups = module.num_key_value_groups
        return keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)

    def mixed(self, module: Any, heads: Tensor) -> Tensor:
        """What attention's heads give together, `(batch, tokens, width)`; a joint one's files mean it without
        the projection.
        """
        joined = heads.transpose(1, 2).flatten(2)
        return joined if self.joint else cast(Tensor, getattr(module, self.output)(joined))

    def _heads(self, module: Any, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, module.head_dim).transpose(1, 2)


SEPARATE, JOINT = SelfAttention("o_proj", joint=False), SelfAttention("c_proj", joint=True)


def resolve(module: nn.Module) -> Base | None:
    """The base of a decoder's attention, or None for any other module."""
    if not hasattr(module, "head_dim"):
        return None
    if {"q_proj", "k_proj", "v_proj", "o_proj"} <= module._modules.keys() and hasattr(
        module, "num_key_value_groups"
    ):
        return SEPARATE
    return (
        JOINT
        if {"c_attn", "c_proj"} <= module._modules.keys() and not getattr(module, "is_cross_attention", False)
        else None
    )
