"""What is written: the dtype asked for, the same bytes every time, no network, and what tells the base from
another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftrs
from peftrs import AdapterError, LoraConfig, PeftrsWarning
from peftrs.io.fingerprint import KEY, difference, fingerprint
from tests.model.tiny import bert, llama, logits, shake, stack

HASHING = """
import sys, torch, peftrs
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(6)))
config = peftrs.LoraConfig(target_modules={"0", "1", "2", "3"}, modules_to_save=["4", "5"],
exclude_modules={"2", "3"},
    rank_pattern={"0": 2, "1": 4})
peftrs.get_peft_model(model, config).save_pretrained(sys.argv[1])
"""


def written(folder: Path) -> dict[str, str]:
    """The digest of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def same_under_seeds(folder: Path, seeds: range) -> None:
    found = set()
    for seed in seeds:
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        subprocess.run(
            [sys.executable, "-P", "-c", HASHING, str(folder / str(seed))],
            env=environment,
            check=True,
            timeout=300,
        )
        found.add(json.dumps(written(folder / str(seed))))
    assert len(found) == 1


def test_bytes_are_the_same_under_two_hash_seeds(tmp_path: Path) -> None:
    same_under_seeds(tmp_path, range(2))


@pytest.mark.long
def test_bytes_are_the_same_under_twenty_hash_seeds(tmp_path: Path) -> None:
    same_under_seeds(tmp_path, range(20))


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("base", "dtype", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
    ],
)
def test_the_dtype_is_the_one_asked_for(
    base: torch.dtype, dtype: Any, expected: torch.dtype, tmp_path: Path
) -> None:
    model = peftrs.get_peft_model(llama().to(base), LoraConfig(modules_to_save=["lm_head"]))
    shake(model)
    before = {name: one.dtype for name, one in model.named_parameters()}
    model.save_pretrained(tmp_path, dtype=dtype)
    assert {one.dtype for name, one in stored(tmp_path).items() if "lora" in name} == {expected}
    assert {name: one.dtype for name, one in model.named_parameters()} == before
    again = peftrs.PeftModel.from_pretrained(llama().to(base), tmp_path)
    torch.testing.assert_close(logits(again).float(), logits(model).float(), rtol=0, atol=5e-2)


def test_what_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = peftrs.get_peft_model(stack(), LoraConfig(target_modules=["layers.0"]))
    with pytest.raises(AdapterError, match="is not one that adapters are saved in"):
        model.save_pretrained(tmp_path, dtype="int8")
    with torch.no_grad():
        model.get_parameter("base_model.model.layers.0.lora_A.default.weight").fill_(1e6)
    with pytest.raises(AdapterError, match=r"torch.float16 cannot hold the values of '.*lora_A.weight'"):
        model.save_pretrained(tmp_path, dtype="float16")
    assert not list(tmp_path.iterdir())


# What tells one base from another.


def save(base: nn.Module, folder: Path) -> None:
    peftrs.get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


def other(seed: int = 9) -> Any:
    """A model of the same shapes with other weights."""
    torch.manual_seed(seed)
    return type(llama())(llama().config).eval()


def load(base: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peftrs.PeftModel.from_pretrained(base, folder)


def test_another_base_of_the_same_shapes_is_warned_of(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    load(llama(), tmp_path)
    with pytest.warns(
        PeftrsWarning, match=r"trained on another model than this: \d+ of the \d+ weights .* differ"
    ):
        peftrs.PeftModel.from_pretrained(other(), tmp_path)
    model = peftrs.get_peft_model(other(), LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(PeftrsWarning, match="another model"):
        model.load_adapter(tmp_path, "second")


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_base_does_not_matter(saved: torch.dtype, loaded: torch.dtype) -> None:
    # What is loaded comes from the checkpoint, or from a model saved in the narrower dtype.
    text = fingerprint(llama().to(saved))
    assert text is not None
    assert difference({KEY: text}, llama().to(loaded)) is None
    assert difference({KEY: text}, other().to(loaded)) is not None


def test_the_text_is_that_of_files_written_before() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-3, 5, 48).view(6, 8))
    assert fingerprint(model) == '{"0.weight":[[6,8],"75299fb5767f"]}'


def test_what_is_left_of_a_base_is_enough_and_little_changes_nothing(tmp_path: Path) -> None:
    text = fingerprint(llama())
    assert text is not None
    notes = {KEY: text}
    base = llama()
    base.resize_token_embeddings(70, mean_resizing=False)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert difference(notes, base) is None
    assert difference(notes, llama().model) is None  # names of another root cannot be compared
    assert difference(notes, bert()) is None
    with torch.device("meta"):
        assert fingerprint(llama()) is None
        assert difference(notes, llama()) is None
    assert fingerprint(nn.Linear(2, 2)) is None


def test_it_is_the_models_own_whatever_adapters_are_in_it() -> None:
    plain = fingerprint(llama())
    model = peftrs.get_peft_model(
        llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    )
    assert fingerprint(model.get_base_model()) == plain
    model.merge_adapter()
    assert plain is not None
    assert difference({KEY: plain}, model.get_base_model()) is None
    merged = fingerprint(model.get_base_model())
    assert merged is not None
    assert difference({KEY: merged}, llama()) is None
    assert len(plain) < 4000


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "{", '{"a": 1}', '{"model.embed_tokens.weight": 1}', "[" * 100_000]
)
def test_metadata_that_says_nothing_is_left_out(text: str) -> None:
    found = difference({KEY: text}, llama())
    assert found is None or "1 of the 1 weights" in found


def test_other_writers_metadata_stays_as_it_is(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    assert set(metadata(tmp_path)) == {"format", "config_sha256", KEY}
    save_file(stored(tmp_path), tmp_path / "adapter_model.safetensors", {"format": "pt"})
    load(other(), tmp_path)


# Starts that come from the base leave it as it is.


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_no_start_changes_the_base_or_another_adapter(start: str, tmp_path: Path) -> None:
    model = peftrs.get_peft_model(llama(), LoraConfig(init_lora_weights=False))
    own = {name: one.clone() for name, one in peftrs.get_base_model_state_dict(model).items()}
    expected = logits(model)
    config = LoraConfig(init_lora_weights=start, target_modules=["q_proj", "o_proj"])
    model.add_adapter("started", config)
    assert torch.equal(logits(model), expected)
    model.set_adapter("started")
    torch.testing.assert_close(logits(model), logits(llama()), rtol=0, atol=1e-5)
    shake(model)
    changed = logits(model)
    model.save_pretrained(tmp_path)
    again = peftrs.PeftModel.from_pretrained(llama(), tmp_path)
    plain = logits(again)
    again.load_adapter(tmp_path / "started", "started")
    assert torch.equal(logits(again), plain)
    again.set_adapter("started")
    torch.testing.assert_close(logits(again), changed, rtol=0, atol=1e-5)
    for one in (model, again):
        assert all(
            torch.equal(tensor, own[name]) for name, tensor in peftrs.get_base_model_state_dict(one).items()
        )
