"""The model card: a header that hubs and trainers read, over text that people wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import peftrs
from peftrs.io.card import card
from tests.model.tiny import llama

WRITTEN = """---
license: mit
tags:
- old
- older
datasets:
- glue
library_name: other
---
# What I did

- PEFT was fun
"""


def parts(text: str) -> tuple[dict[str, object], str]:
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def made(existing: str | None = None, base: str = "org/model", pipeline: str | None = None) -> str:
    return card(
        existing, base=base, methods=["LORA"], tags=["lora", f"base_model:adapter:{base}"], pipeline=pipeline
    )


def test_a_new_card_says_what_the_adapter_is_for() -> None:
    header, body = parts(made(pipeline="text-generation"))
    assert header == {
        "base_model": "org/model",
        "library_name": "peft",
        "tags": ["base_model:adapter:org/model", "lora"],
        "pipeline_tag": "text-generation",
    }
    assert "`org/model`" in body
    assert f"- peftrs {peftrs.__version__}" in body


def test_what_people_wrote_is_kept() -> None:
    header, body = parts(made(WRITTEN))
    assert header["license"] == "mit"
    assert header["datasets"] == ["glue"]
    assert header["tags"] == ["base_model:adapter:org/model", "lora"]
    assert header["library_name"] == "peft"
    assert body.startswith("# What I did\n\n- PEFT was fun\n")


@pytest.mark.parametrize("existing", [None, WRITTEN, "no header at all", "---\nnever: closed\n"])
def test_writing_a_card_again_changes_nothing(existing: str | None) -> None:
    once = made(existing, pipeline="text-generation")
    assert made(once, pipeline="text-generation") == once


def test_a_pipeline_that_is_stated_stays() -> None:
    header, _ = parts(made("---\npipeline_tag: summarization\n---\n", pipeline="text-generation"))
    assert header["pipeline_tag"] == "summarization"


def test_a_base_without_a_name_is_not_named() -> None:
    header, _ = parts(made(base=""))
    assert set(header) == {"library_name", "tags"}
    header, _ = parts(made("---\nbase_model: stated/before\n---\nText", base=""))
    assert header["base_model"] == "stated/before"


@pytest.mark.parametrize("base", ["a: b", "x\ntags: [evil]", "---", "yes # no", '"', "C:\\models\\new"])
def test_a_name_is_data_whatever_it_is(base: str) -> None:
    header, _ = parts(made(base=base))
    assert header["base_model"] == base
    assert set(header) == {"base_model", "library_name", "tags"}


def test_saving_writes_the_card_beside_the_adapter(tmp_path: Path) -> None:
    base = llama()
    base.add_model_tags(["mine"])
    model = peftrs.get_peft_model(base, peftrs.LoraConfig(task_type="CAUSAL_LM"), "other")
    model.save_pretrained(tmp_path)
    header, _ = parts((tmp_path / "README.md").read_text())
    assert header["tags"] == ["lora", "mine", "transformers"]
    assert header["pipeline_tag"] == "text-generation"
    assert not (tmp_path / "other" / "README.md").exists()
