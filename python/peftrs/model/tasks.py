"""One class a task, since libraries tell models by their class: they differ in the layers trained whole
beside every adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from peftrs.config import PeftConfig, TaskType
from peftrs.model.peft_model import PeftModel
from peftrs.planning.settle import HEADS


class PeftModelForSequenceClassification(PeftModel):
    """Classifies whole texts: the head is trained and saved with the adapter."""

    heads: ClassVar[tuple[str, ...]] = HEADS["SEQ_CLS"]


class PeftModelForTokenClassification(PeftModel):
    """Classifies tokens: the head is trained and saved with the adapter."""

    heads: ClassVar[tuple[str, ...]] = HEADS["TOKEN_CLS"]


class PeftModelForQuestionAnswering(PeftModel):
    """Finds answers in texts: the head is trained and saved with the adapter."""

    heads: ClassVar[tuple[str, ...]] = HEADS["QUESTION_ANS"]


class PeftModelForCausalLM(PeftModel):
    """Continues texts."""


class PeftModelForSeq2SeqLM(PeftModel):
    """Turns texts into others."""


class PeftModelForFeatureExtraction(PeftModel):
    """Turns texts into vectors."""


class PeftMixedModel(PeftModel):
    """Adapters of several kinds on one model, which every `PeftModel` here takes; this one has no task and
    several names.
    """

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Takes one or several adapters out of the model."""
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            super().delete_adapter(name)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS.value: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM.value: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM.value: PeftModelForCausalLM,
    TaskType.TOKEN_CLS.value: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS.value: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION.value: PeftModelForFeatureExtraction,
}


def class_for(config: PeftConfig, default: type[PeftModel] = PeftModel) -> type[PeftModel]:
    """The class for a config's task type, or the default if it names none."""
    named = config.task_type is not None and default is not PeftMixedModel
    return default if not named else MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type), default)
