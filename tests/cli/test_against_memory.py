"""`peftrs-merge` writes what merging in memory gives, for every configuration whose adapter a file can
hold.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import peftrs
from peftrs import _native
from tests.interchange.cases import CASES, Case
from tests.interchange.test_with_peft import shake

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
"""Configurations and the ties that merging cuts are told about, here as intended."""


def save(model: nn.Module, folder: Path) -> None:
    """The model as its checkpoint, each tied weight once."""
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
        return
    folder.mkdir()
    save_file(dict(model.state_dict()), folder / "model.safetensors")


def in_memory(case: Case, dtype: torch.dtype, folder: Path) -> dict[str, Tensor]:
    """Saves base and adapter, and gives the weights with the adapter in them."""
    base, _ = case.model()
    base = base.to(dtype)
    save(base, folder / "base")
    adapted: Any = peftrs.get_peft_model(base, getattr(peftrs, case.config)(**case.arguments))
    shake(adapted)
    adapted.save_pretrained(folder / "adapter")
    # Merged from the file, as the tool does.
    again = case.model()[0].to(dtype)
    return dict(peftrs.PeftModel.from_pretrained(again, folder / "adapter").merge_and_unload().state_dict())


def units_apart(one: Tensor, other: Tensor) -> int:
    """How many values of their dtype lie between the two that are furthest apart."""
    integer = {2: torch.int16, 4: torch.int32}[one.element_size()]
    steps = [tensor.contiguous().view(integer).long() for tensor in (one, other)]
    ordered = [torch.where(step < 0, torch.iinfo(integer).min - step, step) for step in steps]
    return max((ordered[0] - ordered[1]).abs().flatten().tolist(), default=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_is_written_is_what_memory_holds(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = in_memory(case, dtype, tmp_path)
    code = _native.merge_main(
        [str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--quiet"]
    )
    assert code == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    # A tied head is in the file only if the merge cut the tie.
    assert expected.keys() - written.keys() <= {"lm_head.weight"}
    assert not written.keys() - expected.keys()
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert any(not tensor.equal(base[name]) for name, tensor in written.items() if name in base)
    apart = {name: units_apart(tensor, expected[name]) for name, tensor in written.items()}
    assert {name: units for name, units in apart.items() if units > 1} == {}


PAIRS = ("lora-linear", "lora-dora", "lora-bias", "ia3-inputs", "oft-exact", "oft-linear")
PAIRED = {case.id: case for case in CASES if case.id in PAIRS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(PAIRED, PAIRED)))
def test_two_adapters_apply_in_the_order_of_the_fold(
    first: str, second: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    for name, case in (("a", PAIRED[first]), ("b", PAIRED[second])):
        base = case.model()[0].to(dtype)
        adapted: Any = peftrs.get_peft_model(base, getattr(peftrs, case.config)(**case.arguments))
        shake(adapted)
        adapted.save_pretrained(tmp_path / name)
    base = PAIRED[first].model()[0].to(dtype)
    save(base, tmp_path / "base")
    both = peftrs.PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    both.load_adapter(tmp_path / "b", adapter_name="b")
    expected = both.merge_and_unload(adapter_names=["a", "b"]).state_dict()
    folders = [str(tmp_path / name) for name in ("base", "a", "b")]
    assert _native.merge_main([*folders, "-o", str(tmp_path / "out"), "--quiet"]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    # Where terms cancel, float32 sums of another order round to more than a neighbour.
    close = {torch.float32: 1e-7, torch.bfloat16: 2**-8}[dtype]
    for name, tensor in written.items():
        torch.testing.assert_close(
            tensor.double(), expected[name].double(), rtol=close, atol=close / 100, msg=name
        )
