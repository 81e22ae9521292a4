"""A mixed batch gives what PEFT gives, from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peftrs
from tests.interchange.cases import bert, llama
from tests.interchange.test_with_peft import near, shake

NAMES = ["b", "__base__", "a", "b"]
TOKENS = torch.randint(0, 32, (4, 7), generator=torch.Generator().manual_seed(2))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
SETTINGS: dict[str, Any] = {
    "linear": (
        llama,
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "r": 3},
    ),
    "embedding": (
        llama,
        {"target_modules": ["embed_tokens", "o_proj"]},
        {"target_modules": ["q_proj"], "use_rslora": True},
    ),
    "token-rows": (
        llama,
        *({"target_modules": ["q_proj"], "trainable_token_indices": its} for its in ([3, 5], [5, 7])),
    ),
    "classifier": (bert, *({"target_modules": [name], "task_type": "SEQ_CLS"} for name in ("query", "key"))),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_mixed_batch_is_the_same(case: str, tmp_path: Path) -> None:
    make, first, second = SETTINGS[case]
    model = peftrs.get_peft_model(make()[0], peftrs.LoraConfig(**first), "a")
    model.add_adapter("b", peftrs.LoraConfig(**second))
    for name in "ab":
        model.set_adapter(name)
        shake(model)
    model.save_pretrained(tmp_path)
    outputs = []
    for library in (peftrs, peft):
        loaded = library.PeftModel.from_pretrained(make()[0], tmp_path / "a", adapter_name="a")
        loaded.load_adapter(tmp_path / "b", "b")
        with torch.no_grad():
            outputs.append(loaded.eval()(input_ids=TOKENS, adapter_names=NAMES).logits)
    near(outputs[0], outputs[1], 2e-6)
