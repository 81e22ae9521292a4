"""Merging in another dtype where processes share a model out: it is done, or refused with nothing changed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from peftrs import MergeError
from tests.sharded import group, runs
from tests.sharded.test_training import SPREAD, needs_plans

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="starts processes that find this module by its name"),
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 has no FSDP2 on CPUs"
    ),
]


def changed(model: Any) -> Any:
    """The model with an adapter that does something."""
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.05)
    return model


def fsdp(folder: Path) -> dict[str, Any]:
    """What is said of a model under FSDP2, and what it answers before and after, and merged in its own
    dtype.
    """
    model = runs._sharded(changed(runs.adapted(folder)), runs._mesh())
    before = runs.answers(model)
    with pytest.raises(MergeError) as caught:
        model.merge_and_unload(dtype=torch.bfloat16)
    found = {"said": str(caught.value), "before": before, "after": runs.answers(model)}
    merged = model.merge_and_unload(dtype=torch.float32)
    return found | {"merged": runs.answers(merged)}


def plan(folder: Path) -> dict[str, Any]:
    """The same of a model under a tensor-parallel plan, merged in two dtypes."""
    from transformers.distributed import DistributedConfig

    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float64):
        loading = {"distributed_config": DistributedConfig(tp_size=dist.get_world_size())}
        model = changed(runs.adapted(folder, **loading))
        found["before"] = runs.answers(model)
        merged = model.merge_and_unload(dtype=dtype)
        found[str(dtype)] = runs.answers(merged)
        found[f"{dtype}s"] = sorted({str(one.dtype) for one in merged.parameters()})
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recast")
    runs.base(folder)
    group.run(2, [f"{__name__}.fsdp", *([f"{__name__}.plan"] if SPREAD else [])], folder)
    return folder


def test_fsdp_keeps_the_dtype_that_it_met_a_model_in(ran: Path) -> None:
    for found in group.results(ran, "fsdp", 2):
        assert found["said"].startswith(
            "fully_shard keeps the dtype that it met a model in, and 'model.embed_tokens.weight'"
        )
        assert "are not of torch.bfloat16; hint: merge without `dtype`" in found["said"]
        assert "lora" not in found["said"]
        assert torch.equal(found["before"], found["after"])
        torch.testing.assert_close(found["merged"], found["before"], rtol=0, atol=1e-5)


@needs_plans
def test_a_tensor_parallel_model_is_recast(ran: Path) -> None:
    for found in group.results(ran, "plan", 2):
        for dtype, near in ((torch.bfloat16, 0.03), (torch.float64, 1e-5)):
            assert found[f"{dtype}s"] == [str(dtype)]
            assert found[str(dtype)].dtype is dtype
            torch.testing.assert_close(found[str(dtype)].float(), found["before"], rtol=0, atol=near)
