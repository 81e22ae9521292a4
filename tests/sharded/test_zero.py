"""DeepSpeed's ZeRO-3, told by what it hangs on parameters: gathered to be read and saved, and never taken for
what is there.

The stand-in keeps to the contract of `deepspeed.zero`: a parameter in parts has no elements but `ds_id`,
`ds_shape`, `ds_numel`; in a `GatheredParameters` it is whole, and what was put into it stays if a process may
modify it (`modifier_rank`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftrs
from tests.model import tiny

WHOLE: dict[int, torch.Tensor] = {}


def part(model: nn.Module) -> None:
    """Leaves nothing of the parameters in this process."""
    for parameter in model.parameters():
        held: Any = parameter
        held.ds_id, held.ds_shape, held.ds_numel = len(WHOLE), parameter.shape, parameter.numel()
        WHOLE[held.ds_id] = parameter.detach().clone()
        parameter.data = parameter.new_empty(0)


@contextmanager
def gathered(parameters: list[Any], modifier_rank: int | None = None) -> Iterator[None]:
    for one in parameters:
        one.data = WHOLE[one.ds_id].clone()
    yield
    for one in parameters:
        if modifier_rank is not None:
            WHOLE[one.ds_id] = one.detach().clone()
        one.data = one.new_empty(0)


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    WHOLE.clear()
    monkeypatch.setitem(
        sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered))
    )


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["lora", "dora", "pissa"]
)
def test_adapters_start_over_weights_in_parts_and_are_saved_whole(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    found = []
    for parted in (False, True):
        base = tiny.llama()
        if parted:
            part(base)
        torch.manual_seed(3)
        model = peftrs.get_peft_model(
            base, peftrs.LoraConfig(target_modules=["q_proj", "down_proj"], **options)
        )
        if parted:
            part(
                nn.ModuleList(
                    module
                    for name, module in model.named_modules()
                    if name.endswith((".default", "magnitude_vector"))
                )
            )
        model.save_pretrained(tmp_path / str(parted))
        found.append(load_file(tmp_path / str(parted) / "adapter_model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_new_values_go_into_parameters_in_parts(tmp_path: Path) -> None:
    source = peftrs.get_peft_model(tiny.llama(), peftrs.LoraConfig(target_modules=["q_proj"]))
    tiny.shake(source)
    source.save_pretrained(tmp_path / "adapter")
    model = peftrs.get_peft_model(tiny.llama(), peftrs.LoraConfig(target_modules=["q_proj"]))
    part(model)
    model.load_adapter(tmp_path / "adapter", "default")
    assert all(one.numel() == 0 for one in model.parameters())
    model.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
