"""PEFT's classes of tuners, one a method (`LoraModel`): as questions what adapters a tuner holds, and as ways
to make one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftrs.config import PeftConfig, PeftType
from peftrs.core.method import method_for
from peftrs.model.tuner import Tuner
from peftrs.planning.attach import attach
from peftrs.planning.defaults import TARGETS


class TunerKind(type):
    """The class of those classes: an instance of one is a `Tuner` whose first adapter is of its method."""

    peft_type: PeftType

    def __instancecheck__(cls, instance: Any) -> bool:
        configs = instance.peft_config.values() if isinstance(instance, Tuner) else ()
        return next((config.peft_type == cls.peft_type for config in configs), False)

    def __call__(
        cls,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> Tuner:
        """A tuner over the model, which gets the adapter; see `get_peft_model` for what raises."""
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        attach(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, names=state_dict)
        return Tuner(model)

    @property
    def prefix(cls) -> str:
        """How the names of the method's tensors begin."""
        return method_for(cls.peft_type).prefix

    @property
    def uses_shared_state(cls) -> bool:
        """Whether the method's layers share tensors that no one of them owns."""
        return False

    @property
    def target_module_mapping(cls) -> dict[str, tuple[str, ...] | str]:
        """The layers that are targets when a config does not say, by model type."""
        return TARGETS.get(cls.peft_type, {})


def _named(name: str, peft_type: PeftType) -> TunerKind:
    text = f"A model whose layers {peft_type} adapters change."
    return TunerKind(name, (), {"__doc__": text, "__module__": __name__, "peft_type": peft_type})


LoraModel = _named("LoraModel", PeftType.LORA)
IA3Model = _named("IA3Model", PeftType.IA3)
OFTModel = _named("OFTModel", PeftType.OFT)
AdaptionPromptModel = _named("AdaptionPromptModel", PeftType.ADAPTION_PROMPT)
TrainableTokensModel = _named("TrainableTokensModel", PeftType.TRAINABLE_TOKENS)

TUNERS = {
    one.peft_type: one for one in (LoraModel, IA3Model, OFTModel, AdaptionPromptModel, TrainableTokensModel)
}
"""The classes by `peft_type`."""
