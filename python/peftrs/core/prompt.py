"""Prompts: what an adapter trains that changes no layer, but what the model is given to read.

An encoder holds one adapter's tensors and makes the prompt of them: virtual tokens, put before the embeddings
of the text, or keys and values, put before those that attention makes of it. `Prompts` holds the encoders of
a model as its child `prompt_encoder`, and the hooks of `peftrs.core.prompt_call` put the active one's prompt
into every call of the model.
"""

from __future__ import annotations

import warnings
from abc import ABC
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftrs.bases.kinds import Affine, LayerSpec
from peftrs.config import PromptLearningConfig
from peftrs.core.activation import Activation, Switched
from peftrs.core.method import Adapter, Method
from peftrs.errors import PeftrsWarning

CHILD = "prompt_encoder"
"""The name of the model's child that holds its prompts."""
PROMPT = "prompt_embeddings"
"""The name of the prompt in files."""
IGNORED = -100
"""The label of tokens that no loss is for."""


class Encoder(nn.Module):
    """One adapter's prompt. `embedding` holds the prompt itself, or what a network makes it of.

    With `word_embeddings` the first values may be taken from them, as the config says; without, nothing that
    the config names is opened. Files hold the prompt and not the network: what is loaded goes on as the
    prompt itself.
    """

    network: ClassVar[tuple[str, ...]] = ()
    """The modules that make the prompt of the embedding."""
    in_decoder: ClassVar[bool] = False
    """Whether decoders read virtual tokens too, the second half of them."""

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(*self.shape(config))

    @classmethod
    def shape(cls, config: Any) -> tuple[int, int]:
        """The shape of the prompt: a row for each virtual token."""
        return config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim

    @property
    def made(self) -> bool:
        """Whether a network makes the prompt."""
        return any(name in self._modules for name in self.network)

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """The rows of these numbers, (batch, rows) to (batch, rows, width)."""
        return cast(Tensor, self.embedding(indices))

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        """All rows, (1, rows, width), or of each task with `task_ids`, (tasks, rows, width)."""
        rows = torch.arange(self.shape(self.config)[0], device=self.device)
        return cast(
            Tensor, self(rows.unsqueeze(0)) if task_ids is None else self(rows.unsqueeze(0), task_ids)
        )

    @property
    def device(self) -> torch.device:
        """Where the prompt lies."""
        return next(self.parameters()).device

    def labels(self, call: dict[str, Any], labels: Tensor) -> Tensor:
        """The labels of a text, (batch, tokens), with those of the virtual tokens before them."""
        return torch.cat(
            (labels.new_full((len(labels), self.config.num_virtual_tokens), IGNORED), labels), dim=1
        )

    def finish(self, output: Any) -> Any:
        """What the model returned, with the loss as this kind of prompt defines it."""
        return output

    def trained(self) -> list[nn.Parameter]:
        """The tensors that are trained."""
        return list(self.parameters())

    def saved(self) -> dict[str, Tensor]:
        """What files hold, by the names that they have there."""
        return {PROMPT: self.prompt()[0].detach() if self.made else self.embedding.weight}

    def load(self, name: str, value: Tensor, home: torch.device) -> None:
        """Takes a tensor out of a file; `home` is where it belongs while this one waits for values."""
        if self.made:
            if any(parameter.requires_grad for parameter in self.trained()):
                text = (
                    "files hold a prompt without the network that made it: training goes on with the prompt"
                    " itself"
                )
                warnings.warn(text, PeftrsWarning, stacklevel=4)
            for module in self.network:
                self._modules.pop(module, None)
            trained = self.embedding.weight.requires_grad
            with self.device:
                self.embedding = nn.Embedding(*self.shape(self.config)).requires_grad_(trained)
        put(self.embedding, "weight", value, home)


def put(module: nn.Module, name: str, value: Tensor, home: torch.device) -> None:
    """Copies a value into a parameter, or makes the parameter of it where that still waits for values."""
    held = cast(nn.Parameter, getattr(module, name))
    if held.device.type == "meta":
        setattr(
            module,
            name,
            nn.Parameter(value.to(home, held.dtype, copy=True), requires_grad=held.requires_grad),
        )
    else:
        with torch.no_grad():
            held.copy_(value)


def rows_of(word_embeddings: nn.Module, tokens: Tensor) -> Tensor:
    """What a model makes of these tokens, (tokens, embedding), in float32."""
    with torch.no_grad():
        return cast(Tensor, word_embeddings(tokens.to(home_of(word_embeddings)))).to(
            "cpu", torch.float32, copy=True
        )


class CacheEncoder(Encoder):
    """A prompt of keys and values: a row holds those of all layers for one virtual token, (layers * 2 * heads
    * head size).
    """

    lent = False
    """Whether the model was given a cache by a caller who wants none."""

    def finish(self, output: Any) -> Any:
        if self.lent and getattr(output, "past_key_values", None) is not None:
            output.past_key_values = None
        self.lent = False
        return output

    @classmethod
    def shape(cls, config: Any) -> tuple[int, int]:
        return config.num_virtual_tokens, config.num_layers * 2 * config.token_dim

    def key_values(self, batch: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values, (batch, heads, tokens, head size)."""
        config = self.config
        count = 2 * config.num_layers
        rows = (
            self.prompt().to(dtype).view(1, config.num_virtual_tokens, count, config.num_attention_heads, -1)
        )
        rows = rows.permute(2, 0, 3, 1, 4).expand(-1, batch, -1, -1, -1)
        # The format of encoder-decoders: every layer has rows for its cross-attention too, which repeat the
        # first and are not used.
        step = 2 * config.num_transformer_submodules
        return [
            (rows[step * layer % count], rows[(step * layer + 1) % count])
            for layer in range(config.num_layers)
        ]

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Takes keys and values from elsewhere, a row for each token.

        Raises `ValueError` if they do not fit.
        """
        if self.made:
            raise ValueError("Cannot load flattened prompt embeddings when `prefix_projection=True`.")
        if prompt_embeddings.shape != self.shape(self.config):
            expected = self.shape(self.config)
            raise ValueError(
                f"`prompt_embeddings` has shape {tuple(prompt_embeddings.shape)}, the prompt needs {expected}"
            )
        self.load(PROMPT, prompt_embeddings, self.device)


class PromptMethod(Method, ABC):
    """A kind of prompt. Supply `encoder`; layers stay as they are."""

    config: type[PromptLearningConfig]
    layers = frozenset()
    prefix = CHILD
    encoder: type[Encoder]

    def slots(self, config: Any, spec: LayerSpec, values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return {}

    def init(self, adapter: Adapter, base: Affine) -> None:
        """No layer has anything to fill."""

    def apply(self, adapter: Adapter, affine: Affine) -> Affine:
        return affine

    def build(self, config: Any, word_embeddings: nn.Module, *, fill: bool) -> Encoder:
        """The adapter's encoder; with `fill=False` it waits for values (device meta), and nothing that the
        config names is read.
        """
        if not fill and (named := [name for name in config.sources if getattr(config, name)]):
            text = (
                f"{', '.join(named)}: kept, but never used to open, fetch or import anything where an adapter"
                " is loaded"
            )
            warnings.warn(text, PeftrsWarning, stacklevel=7)
        with torch.device("cpu" if fill else "meta"):
            encoder = self.encoder(config, word_embeddings if fill and not config.inference_mode else None)
        return encoder.to(home_of(word_embeddings)) if fill else encoder


def home_of(word_embeddings: nn.Module) -> torch.device:
    """Where prompts belong: beside the embeddings, or on the CPU while those are still to be loaded."""
    device = next(word_embeddings.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


class Prompts(Switched, nn.ModuleDict):
    """The prompts of a model, by adapter name; one acts at a time."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.join(activation)
        self.hosts: dict[str, str] = {}
        """The path of the module whose calls get the prompt, by adapter name."""
        self.task_ids: Tensor | None = None
        """The tasks of the rows that are generated for."""

    def encoder(self, adapter: str) -> Encoder:
        """An adapter's encoder."""
        return cast(Encoder, self[adapter])

    def acting(self) -> str | None:
        """The adapter whose prompt is to be read now."""
        return (
            next((name for name in self.state.active if name in self), None) if self.state.enabled else None
        )

    def conflict(self, names: Sequence[str]) -> str | None:
        held = [name for name in names if name in self]
        return f"{held} are prompts; only one of them can be active" if len(held) > 1 else None

    def adapter_names(self) -> tuple[str, ...]:
        return tuple(self)

    def tensors(self, adapter: str) -> list[nn.Parameter]:
        return list(self.encoder(adapter).parameters()) if adapter in self else []

    def require_grad(self, names: Sequence[str], *, only: bool = False, requires_grad: bool = True) -> None:
        for name in self:
            if name in names or only:
                for parameter in self.encoder(name).trained():
                    parameter.requires_grad_(requires_grad and name in names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drops an adapter's prompt."""
        if adapter_name in self:
            del self[adapter_name]
            del self.hosts[adapter_name]
        self.forget(adapter_name)


def prompts_of(model: nn.Module) -> Prompts | None:
    """A model's prompts, if it has any."""
    held = model._modules.get(CHILD)
    return held if isinstance(held, Prompts) else None
