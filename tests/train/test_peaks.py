"""No step of an adapter's life takes a copy of the model: adding it, training, saving, loading, merging,
saving the whole.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.train import peaks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of a process")
NEEDS = {"memory": "transformers", "disk": "accelerate", "nf4": "bitsandbytes", "int8": "bitsandbytes"}


@pytest.mark.parametrize(
    "kind", ["memory", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("disk", "nf4", "int8"))]
)
def test_no_step_takes_a_copy_of_the_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(NEEDS[kind])
    # What is freed goes back at once.
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "65536")
    whole = peaks.write(tmp_path / "base", layers=24)
    found = peaks.watched(peaks.live, tmp_path, kind)
    assert len(found) == (8 if kind in ("nf4", "int8") else 9)
    allowed = dict.fromkeys(found, whole / 4)
    # Activations, gradients, and what the optimizer keeps.
    allowed["train"] = whole / 2
    if kind != "disk":
        # What is to be in memory gets there once; libraries that quantize do so weight by weight.
        allowed["load"] += whole if kind == "memory" else whole / 2
    if kind == "nf4":
        # 4.5 bits a weight become 16, for good.
        allowed["merge for good"] += whole * (1 - 4.5 / 16)
    assert {phase: most for phase, (_, most) in found.items() if most > allowed[phase]} == {}
