"""Context-aware prompt tuning: the embeddings of an example context, moved within small balls around them.

Blau et al. 2024, https://arxiv.org/abs/2410.17222.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftrs.config import PeftType, PromptLearningConfig, TaskType
from peftrs.core.prompt import IGNORED, PROMPT, Encoder, PromptMethod, put, rows_of
from peftrs.errors import ConfigError
from peftrs.registry import register

KINDS = 4
"""Token types count up by example: input template 1, input 2, output template 3, output (the label) 4, then
the next example's.
"""
TEXT = 4
SMALLEST = 1e-10


@dataclass
class CPTConfig(PromptLearningConfig):
    """The settings of context-aware prompt tuning: PEFT's names, defaults and file format.

    The context's tokens, and the type of each (see `KINDS`, 0 for none) say how far it may move: by
    `opt_projection_epsilon` for inputs, by `opt_projection_format_epsilon` for templates, not at all for
    labels.
    """

    sources: ClassVar[tuple[str, ...]] = ("tokenizer_name_or_path",)

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        self.peft_type = PeftType.CPT
        self.num_transformer_submodules = 1
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        self.num_virtual_tokens = len(self.cpt_token_ids)
        self.cpt_mask = [1] * self.num_virtual_tokens if self.cpt_mask is None else self.cpt_mask
        if self.cpt_tokens_type_mask is None:
            self.cpt_tokens_type_mask = [1] * self.num_virtual_tokens
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError(f"CPTConfig only supports task_type = {TaskType.CAUSAL_LM.value}.")
        if not len(self.cpt_token_ids) == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ConfigError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length.")


class CPTEmbedding(Encoder):
    """The context's embeddings, which stay, and how far each was moved, both (tokens, embedding)."""

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        if word_embeddings is not None:
            self.embedding.weight.data = rows_of(word_embeddings, torch.tensor(config.cpt_token_ids))
        self.embedding.requires_grad_(False)
        self.delta_embedding = nn.Embedding(*self.shape(config))
        nn.init.zeros_(self.delta_embedding.weight)
        self.pending: tuple[Tensor, Tensor] | None = None

    def trained(self) -> list[nn.Parameter]:
        return list(self.delta_embedding.parameters())

    def get_epsilon(self) -> Tensor:
        """How far each token may move, (tokens,)."""
        config, scale = self.config, (self.config.token_dim / 2048) ** 0.5
        template = config.opt_projection_format_epsilon * scale
        by_kind = torch.tensor([SMALLEST, template, config.opt_projection_epsilon * scale, template])
        types = torch.tensor(config.cpt_tokens_type_mask)
        return torch.where(types > 0, by_kind[types % KINDS], SMALLEST).to(self.device)

    @torch.no_grad()
    def get_projection(self) -> Tensor:
        """How far each token was moved, shortened to what it may move by, (tokens, embedding)."""
        moved, most = self.delta_embedding.weight, self.get_epsilon()
        norm = moved.norm(dim=1)
        projected: Tensor = moved * (most / norm.clamp(min=most)).where(norm > 0, 1.0).unsqueeze(1)
        return projected

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            self.delta_embedding.weight.copy_(self.get_projection())
        moved = self.delta_embedding(indices)
        # Labels take part in the context and are not moved.
        free = torch.tensor(self.config.cpt_tokens_type_mask, device=moved.device)[indices] % KINDS > 0
        return super().forward(indices) + torch.where(free.unsqueeze(-1), moved, moved.detach())

    def saved(self) -> dict[str, Tensor]:
        return {PROMPT: self.prompt()[0].detach()}

    def load(self, name: str, value: Tensor, home: torch.device) -> None:
        """What was moved stays where it is: from here on it is the context."""
        put(self.embedding, "weight", value, home)
        put(self.delta_embedding, "weight", torch.zeros_like(value), home)

    def labels(self, call: dict[str, Any], labels: Tensor) -> Tensor:
        context = torch.tensor(self.config.cpt_tokens_type_mask, device=labels.device).expand(len(labels), -1)
        tokens = torch.tensor(self.config.cpt_token_ids, device=labels.device).expand(len(labels), -1)
        types = call.pop("input_type_mask", None)
        types = torch.full_like(labels, TEXT) if types is None else types.to(labels.device)
        # The text is the next example: its types stay what they are only if whole examples stand before it.
        before = -(-max(self.config.cpt_tokens_type_mask) // KINDS) * KINDS
        types = torch.cat((context, torch.where(types > 0, types + before, types)), dim=1)
        is_label = (types > 0) & (types % KINDS == 0)
        labels = torch.cat((tokens, labels), dim=1).where(is_label, IGNORED)
        self.pending = labels, types
        return labels

    def finish(self, output: Any) -> Any:
        """The loss over the labels of all examples, those of earlier ones weighing less with
        `opt_weighted_loss_type="decay"`.
        """
        if self.pending is None:
            return output
        (labels, types), self.pending = (part[:, 1:].to(output.logits.device) for part in self.pending), None
        loss = functional.cross_entropy(
            output.logits[:, :-1].mT, labels, ignore_index=IGNORED, reduction="none"
        )
        counted = labels != IGNORED
        if self.config.opt_weighted_loss_type == "decay":
            loss = loss * self.decay(types)
        output.loss = loss[counted].mean()
        return output

    def decay(self, types: Tensor) -> Tensor:
        """The weight of each token's loss: 1 in a row's last example, less by the factor for each one
        before.
        """
        weights = torch.ones_like(types, dtype=torch.float32)
        for row, weight in zip(types, weights, strict=True):
            examples = row[(row > 0) & (row % KINDS == 0)].unique()
            for age, example in enumerate(examples.flip(0)):
                weight[row == example] = self.config.opt_loss_decay_factor**age
        return weights


@register
class Cpt(PromptMethod):
    """A context that is moved a little."""

    name = "CPT"
    config = CPTConfig
    encoder = CPTEmbedding
