"""Trained rows of an embedding's table: the rows of a few tokens are replaced, all others stay frozen.

On an output layer that is tied to the embedding the same rows are replaced, so that the two stay tied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.nn import functional

from peftrs.bases.kinds import Affine, LayerKind, LayerSpec
from peftrs.core.method import Adapter, Below, Method
from peftrs.errors import ConfigError
from peftrs.registry import register

ROWS = "token_adapter.trainable_tokens_delta"


@register
class TrainableTokens(Method):
    """What `trainable_token_indices` of other methods' configs adds to embeddings."""

    name = "TOKEN_ROWS"
    prefix = "token_adapter"
    layers = frozenset({LayerKind.EMBEDDING, LayerKind.LINEAR})
    tied_slots = MappingProxyType({ROWS: (ROWS, False)})

    def settle(self, config: Any, spec: LayerSpec) -> dict[str, Any]:
        tokens = list(spec.matched["trainable_token_indices"])
        rows = spec.in_features if spec.kind is LayerKind.EMBEDDING else spec.out_features
        outside = [token for token in tokens if not 0 <= token < rows]
        if outside or len(set(tokens)) < len(tokens):
            fault = f"{outside} lie outside" if outside else "some are named twice for"
            raise ConfigError(f"`trainable_token_indices`: {fault} the table of {rows} rows")
        return {"tokens": tokens}

    def slots(self, config: Any, spec: LayerSpec, values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        width = spec.out_features if spec.kind is LayerKind.EMBEDDING else spec.in_features
        return {ROWS: (len(values["tokens"]), width)}

    def init(self, adapter: Adapter, base: Affine) -> None:
        table = base.weight.mT if adapter.spec.kind is LayerKind.EMBEDDING else base.weight
        adapter[ROWS].copy_(table[adapter.values["tokens"]])

    def conflict(self, adapters: Sequence[Adapter]) -> str | None:
        counts = Counter(token for adapter in adapters for token in adapter.values["tokens"])
        twice = sorted(token for token, count in counts.items() if count > 1)
        return f"{len(adapters)} adapters each replace the rows of tokens {twice[:8]}" if twice else None

    def apply(self, adapter: Adapter, affine: Affine) -> Affine:
        rows, dimension = adapter[ROWS].to(affine.weight.dtype), 0
        if adapter.spec.kind is LayerKind.EMBEDDING:
            rows, dimension = rows.mT, 1
        return Affine(affine.weight.index_copy(dimension, self.tokens(adapter, rows), rows), affine.bias)

    def forward(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        y, rows = below(x), adapter[ROWS]
        tokens = self.tokens(adapter, rows)
        if adapter.spec.kind is LayerKind.LINEAR:
            bias = below.dense().bias
            scores = functional.linear(x.to(rows.dtype), rows, None if bias is None else bias[tokens].to(rows.dtype))
            return y.index_copy(-1, tokens, scores.to(y.dtype))
        hits = x.unsqueeze(-1) == tokens
        # The layer's own lookup over the trained rows alone, so that scaled embeddings scale them too.
        trained = below.op(hits.to(x.dtype).argmax(-1), Affine(rows.mT, None))
        return trained.to(y.dtype).where(hits.any(-1, keepdim=True), y)

    def tokens(self, adapter: Adapter, like: Tensor) -> Tensor:
        """The indices of the trained rows, on the device of `like`."""
        return like.new_tensor(adapter.values["tokens"]).long()
