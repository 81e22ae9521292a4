"""Trained rows of an embedding's table: the rows of a few tokens are replaced, all others stay frozen.

On an output layer that is tied to the embedding the same rows are replaced, so that the two stay tied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional

from peftrs.bases.kinds import Affine, LayerKind, LayerSpec
from peftrs.config import RUNTIME, PeftType, TargetedConfig
from peftrs.core.method import Adapter, Below, Method, Of, Slot, Slots
from peftrs.errors import ConfigError
from peftrs.registry import register


@dataclass
class TrainableTokensConfig(TargetedConfig):
    """The settings of an adapter that trains rows of embeddings and nothing else: PEFT's names, defaults and
    file format.

    Without `target_modules` the model's input embedding is meant. What is tied to an embedding stays so.
    """

    ensure_weight_tying = True

    exclude_modules: str | list[str] | set[str] | None = field(default=None, init=False, metadata=RUNTIME)
    modules_to_save: list[str] | None = field(default=None, init=False, metadata=RUNTIME)
    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.TRAINABLE_TOKENS
        super().__post_init__()


@register
class TrainableTokens(Method):
    """The rows of the tokens that the config names."""

    name = "TRAINABLE_TOKENS"
    config = TrainableTokensConfig
    prefix = "trainable_tokens_"
    attributes = ("token_indices",)
    indices = "token_indices"
    """The config's field that names the tokens."""
    rows = "trainable_tokens_delta"
    shared_saved = True
    """Whether files have the rows once more under the name of a tied layer."""
    layers = frozenset({LayerKind.EMBEDDING, LayerKind.LINEAR})
    unfactored = "trained token rows are no change of low rank"

    def settle(self, config: Any, spec: LayerSpec) -> dict[str, Any]:
        tokens = list(spec.matched.get(self.indices) or getattr(config, self.indices))
        rows = spec.in_features if spec.kind is LayerKind.EMBEDDING else spec.out_features
        outside = [token for token in tokens if not 0 <= token < rows]
        if outside or len(set(tokens)) < len(tokens):
            fault = f"{outside} lie outside" if outside else "some are named twice for"
            raise ConfigError(f"`{self.indices}`: {fault} the table of {rows} rows")
        return {"token_indices": tokens}

    def slots(self, config: Any, spec: LayerSpec, values: dict[str, Any]) -> Slots:
        shape = (
            len(values["token_indices"]),
            spec.out_features if spec.kind is LayerKind.EMBEDDING else spec.in_features,
        )
        if spec.tied is None:
            return {self.rows: shape}
        return {self.rows: Slot(shape, saved=self.shared_saved, of=Of(spec.tied, self.rows))}

    def init(self, adapter: Adapter, base: Affine) -> None:
        table = base.weight.mT if adapter.spec.kind is LayerKind.EMBEDDING else base.weight
        adapter[self.rows].copy_(table[adapter.values["token_indices"]])
        if not adapter.config.init_weights:
            adapter[self.rows].normal_()

    def conflict(self, adapters: Sequence[Adapter]) -> str | None:
        counts = Counter(token for adapter in adapters for token in adapter.values["token_indices"])
        twice = sorted(token for token, count in counts.items() if count > 1)
        return f"{len(adapters)} adapters each replace the rows of tokens {twice[:8]}" if twice else None

    def apply(self, adapter: Adapter, affine: Affine) -> Affine:
        rows, dimension = adapter[self.rows].to(affine.weight.dtype), 0
        if adapter.spec.kind is LayerKind.EMBEDDING:
            rows, dimension = rows.mT, 1
        return Affine(affine.weight.index_copy(dimension, self.tokens(adapter, rows), rows), affine.bias)

    def forward(self, adapter: Adapter, x: Tensor, below: Below) -> Tensor:
        y, rows = below(x), adapter[self.rows]
        tokens = self.tokens(adapter, rows)
        if adapter.spec.kind is LayerKind.LINEAR:
            bias = below.dense().bias
            scores = functional.linear(
                x.to(rows.dtype), rows, None if bias is None else bias[tokens].to(rows.dtype)
            )
            return y.index_copy(-1, tokens, scores.to(y.dtype))
        hits = x.unsqueeze(-1) == tokens
        # The layer's own lookup over the trained rows alone, so that scaled embeddings scale them too.
        trained = below.op(hits.to(x.dtype).argmax(-1), Affine(rows.mT, None))
        return trained.to(y.dtype).where(hits.any(-1, keepdim=True), y)

    def tokens(self, adapter: Adapter, like: Tensor) -> Tensor:
        """The indices of the trained rows, on the device of `like`."""
        return like.new_tensor(adapter.values["token_indices"]).long()


@register
class TokenRows(TrainableTokens):
    """What `trainable_token_indices` of other methods' configs adds to embeddings."""

    name = "TOKEN_ROWS"
    prefix = "token_adapter"
    indices = "trainable_token_indices"
    rows = "token_adapter.trainable_tokens_delta"
    shared_saved = False
    public = False
