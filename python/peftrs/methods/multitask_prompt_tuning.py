"""Multitask prompt tuning: a prompt that tasks share, times a matrix of low rank for each task.

Wang et al. 2023, https://arxiv.org/abs/2303.02861.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftrs.config import PeftType
from peftrs.core.prompt import PROMPT, put
from peftrs.core.prompt_call import read_tensors
from peftrs.errors import AdapterError, ConfigError
from peftrs.methods.prompt_tuning import PromptEmbedding, PromptTuning, PromptTuningConfig
from peftrs.registry import register

FACTORS = ("prefix_task_cols", "prefix_task_rows")


class MultitaskPromptTuningInit(StrEnum):
    """Where the first values come from; the last three take them from a file of another adapter, trained on
    source tasks.
    """

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


SOURCES = tuple(MultitaskPromptTuningInit)[2:]


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """The settings of multitask prompt tuning: PEFT's names, defaults and file format.

    `prompt_tuning_init_state_dict_path` is read when the adapter is made, never when it is loaded, and only
    as safetensors.
    """

    kind: ClassVar[PeftType] = PeftType.MULTITASK_PROMPT_TUNING
    sources: ClassVar[tuple[str, ...]] = (*PromptTuningConfig.sources, "prompt_tuning_init_state_dict_path")

    prompt_tuning_init: str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init in SOURCES and self.prompt_tuning_init_state_dict_path is None:
            raise ConfigError(
                f"prompt_tuning_init_state_dict_path needs to be specified with {self.prompt_tuning_init}"
                " init method"
            )


class MultitaskPromptEmbedding(PromptEmbedding):
    """The shared tokens (tokens, embedding), and each task's factors (tasks, tokens, rank) and (tasks, rank,
    embedding).
    """

    in_decoder = True

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config, word_embeddings)
        tokens, width = self.shape(config)
        self.prefix_task_cols = nn.Parameter(torch.empty(config.num_tasks, tokens, config.num_ranks))
        self.prefix_task_rows = nn.Parameter(torch.empty(config.num_tasks, config.num_ranks, width))
        for factor in (self.prefix_task_cols, self.prefix_task_rows):
            nn.init.normal_(factor, std=0.02)
        if word_embeddings is not None and config.prompt_tuning_init in SOURCES:
            self.take(config)

    def take(self, config: Any) -> None:
        """Takes the first values out of the file of another adapter.

        Raises `ConfigError` where they do not fit.
        """
        source = read_tensors(config.prompt_tuning_init_state_dict_path)
        values = {PROMPT: source[PROMPT]}
        if config.prompt_tuning_init != MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            values |= {name: source[name] for name in FACTORS}
        for name, value in values.items():
            if name in FACTORS:
                one = config.prompt_tuning_init == MultitaskPromptTuningInit.EXACT_SOURCE_TASK
                value = (
                    value[config.prompt_tuning_init_task].unsqueeze(0) if one else value.mean(0, keepdim=True)
                )
            if value.shape != self.saved()[name].shape:
                raise ConfigError(
                    f"{config.prompt_tuning_init_state_dict_path}: {name} has shape {list(value.shape)}, the"
                    f" adapter needs {list(self.saved()[name].shape)}; hint: `num_tasks` is 1 where the"
                    " values come from source tasks"
                )
            self.load(name, value, self.device)

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        if task_ids is None:
            raise AdapterError(
                "task_ids cannot be None: multitask prompts are told which task each row of the batch is of"
            )
        task = self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids]
        return super().forward(indices) * task

    def saved(self) -> dict[str, Tensor]:
        return {PROMPT: self.embedding.weight} | {name: getattr(self, name) for name in FACTORS}

    def load(self, name: str, value: Tensor, home: torch.device) -> None:
        if name in FACTORS:
            put(self, name, value, home)
        else:
            super().load(name, value, home)


@register
class MultitaskPromptTuning(PromptTuning):
    """Virtual tokens that tasks share, and each task's own change of them."""

    name = "MULTITASK_PROMPT_TUNING"
    config = MultitaskPromptTuningConfig
    encoder = MultitaskPromptEmbedding
