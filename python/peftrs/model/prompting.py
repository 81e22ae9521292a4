"""Prompts on whole models: the sizes that a model's config decides, and what `PeftModel` shows of its
prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.core.prompt import PROMPT, CacheEncoder, Prompts, prompts_of
from peftrs.core.prompt_call import (
    ONLY,
    fill,
    is_paired,
    prepend,
    word_embeddings,
)
from peftrs.errors import AdapterError


class NoPromptsError(AdapterError, AttributeError):
    """A model without prompts is asked for them."""


class Prompting:
    """What a `PeftModel` shows of its prompts."""

    @property
    def prompts(self) -> Prompts:
        """The model's prompts. Raises `AdapterError` if it has none, an `AttributeError` for `hasattr`."""
        return _prompts(cast(Any, self).get_base_model())

    @property
    def word_embeddings(self) -> nn.Module:
        """What embeds the tokens that the prompts stand before. Raises as `prompts` does."""
        model: nn.Module = cast(Any, self).get_base_model()
        _prompts(model)
        return word_embeddings(model)

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """The numbers of each prompt's rows."""
        return {name: torch.arange(len(self.prompts.encoder(name).saved()[PROMPT])) for name in self.prompts}

    def get_prompt(
        self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None
    ) -> Any:
        """The active prompt for a batch: (batch, tokens, embedding), or a cache with keys and values in it.

        Raises `AdapterError` if no prompt is active.
        """
        name = self.prompts.acting()
        if name is None:
            raise AdapterError("no prompt is active")
        encoder = self.prompts.encoder(name)
        if isinstance(encoder, CacheEncoder):
            return fill(None, cast(Any, self).get_base_model(), encoder, batch_size)
        return encoder.prompt(task_ids).expand(batch_size, -1, -1)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """An adapter's prompt as its file has it, on the CPU."""
        return self.prompts.encoder(adapter_name).saved()[PROMPT].detach().cpu()


def _prompts(model: nn.Module) -> Prompts:
    found = prompts_of(model)
    if found is None:
        raise NoPromptsError("the model has no prompts: none of its adapters is one")
    return found


@contextmanager
def generating(
    model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What `generate` is to be called with inside the `with`, for the active prompt to be read.

    `task_ids` says which tasks the rows are of. An encoder is run once, before the steps whose calls the
    hooks see.
    """
    prompts = prompts_of(model)
    name = prompts.acting() if prompts is not None else None
    if prompts is None or name is None:
        yield inputs, options
        return
    prompts.task_ids = options.pop("task_ids", None)
    encoder = prompts.encoder(name)
    try:
        if is_paired(model) and not isinstance(encoder, CacheEncoder):
            if inputs or "inputs" in options:
                options["input_ids"], inputs = (inputs[0] if inputs else options.pop("inputs")), inputs[1:]
            options.pop("encoder_outputs", None)
            prepend(model, encoder, options, ONLY, prompts.task_ids)
        with _room(model, encoder.config.num_virtual_tokens):
            yield inputs, options
    finally:
        prompts.task_ids = None


@contextmanager
def _room(model: Any, count: int) -> Iterator[None]:
    """Makes `generate` take static caches longer by the prompt, and leave it to the model to turn its mask
    into one for them.

    What is made before the hooks see a call knows nothing of the prompt. The steps are not compiled: the
    hooks are a part of them.
    """
    longer = getattr(model, "_prepare_static_cache", None)
    if longer is None:
        yield
        return

    def static_cache(*inputs: Any, max_cache_len: int, **options: Any) -> Any:
        return longer(*inputs, max_cache_len=max_cache_len + count, **options)

    def same_mask(attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
        return attention_mask

    def never(*inputs: Any, **options: Any) -> bool:
        return False

    ours = {
        "_prepare_static_cache": static_cache,
        "create_masks_for_generate": same_mask,
        "_valid_auto_compile_criteria": never,
    }
    model.__dict__ |= ours
    try:
        yield
    finally:
        for name in ours:
            del model.__dict__[name]
