"""Adaption prompts (LLaMA-Adapter): in the topmost layers, attention also reads a trained prompt, through a
gate that starts shut.

Zhang et al. 2023, https://arxiv.org/abs/2303.16199.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from peftrs.bases.attention import SelfAttention
from peftrs.bases.kinds import Affine, LayerKind, LayerSpec
from peftrs.config import RUNTIME, PeftType, TargetedConfig
from peftrs.core.method import Adapter, Below, Method, Slots
from peftrs.errors import ConfigError
from peftrs.registry import register

PROMPT, GATE = "adaption_prompt", "adaption_gate"


@dataclass
class AdaptionPromptConfig(TargetedConfig):
    """The settings of adaption prompts: PEFT's names, defaults and file format.

    `target_modules` is what the attention modules are called; the last `adapter_layers` of them get a prompt
    of `adapter_len`.
    """

    exclude_modules: str | list[str] | set[str] | None = field(default=None, init=False, metadata=RUNTIME)
    modules_to_save: list[str] | None = field(default=None, init=False, metadata=RUNTIME)
    adapter_len: int | None = None
    adapter_layers: int | None = None

    def __post_init__(self) -> None:
        self.peft_type = PeftType.ADAPTION_PROMPT
        super().__post_init__()


@register
class AdaptionPrompt(Method):
    """A prompt (1, tokens, width) and a gate (1,) for each attention."""

    name = "ADAPTION_PROMPT"
    config = AdaptionPromptConfig
    prefix = "adaption_"
    layers = frozenset({LayerKind.SELF_ATTENTION})

    def choose(self, config: AdaptionPromptConfig, modules: Sequence[str]) -> set[str]:
        if config.adapter_len is None or config.adapter_layers is None:
            raise ConfigError("Please specify `adapter_len` and `adapter_layers` in `peft_config`")
        found = [name for name in modules if name.endswith(f".{config.target_modules}")]
        if len(found) < config.adapter_layers:
            raise ConfigError(
                f"`adapter_layers` is {config.adapter_layers}, and the model has {len(found)}"
                f" {config.target_modules!r}"
            )
        return set(found[len(found) - config.adapter_layers :])

    def slots(self, config: AdaptionPromptConfig, spec: LayerSpec, values: dict[str, Any]) -> Slots:
        return {PROMPT: (1, cast(int, config.adapter_len), spec.out_features), GATE: (1,)}

    def init(self, adapter: Adapter, base: Affine) -> None:
        nn.init.normal_(adapter[PROMPT])
        nn.init.zeros_(adapter[GATE])

    def apply(self, adapter: Adapter, affine: Affine) -> Affine:
        return affine

    def unmergeable(self, adapter: Adapter) -> str | None:
        return "attention reads the prompt beside its input, which no change of a weight does"

    def forward(self, adapter: Adapter, x: Tensor, below: Below) -> Any:
        output, *rest = below(x)
        base, module = cast(SelfAttention, below.base), below.module
        queries = base.queries(module, x, below.options)
        keys, values = base.keys_and_values(module, adapter[PROMPT].to(x.dtype))
        scores = (queries @ keys.mT / queries.shape[-1] ** 0.5).float().softmax(-1).to(x.dtype)
        added = base.mixed(module, (adapter[GATE] * scores).to(x.dtype) @ values)
        return (output + added).to(output.dtype), *rest
