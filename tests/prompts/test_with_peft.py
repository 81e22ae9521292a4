"""Prompts agree with PEFT 0.21.2, both ways: files, outputs, losses from the same start, and what is
generated.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5ForConditionalGeneration

import peftrs
from tests.prompts.cases import CASES, MASK, MODELS, TOKENS, Case

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"
)
"""PEFT warns of what these models are given on purpose."""


def made(library: Any, case: Case) -> Any:
    torch.manual_seed(4)
    return library.get_peft_model(MODELS[case.model](), case.configure(library)).eval()


def loaded(library: Any, case: Case, folder: Path) -> Any:
    return library.PeftModel.from_pretrained(MODELS[case.model](), folder).eval()


def shake(model: Any) -> None:
    """Moves every trained tensor off its start, the same way for the same names."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(named(model).items()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def named(model: Any) -> dict[str, Tensor]:
    """The trained tensors by the names that PEFT gives them."""
    return {
        name.replace("base_model.model.prompt_encoder.", "prompt_encoder.")
        .replace("base_model.model.", "base_model.")
        .replace("adaption_gate.default", "adaption_gate")
        .replace("adaption_prompt.default", "adaption_prompt"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def output(case: Case, model: Any, **inputs: Any) -> Tensor:
    # PEFT adds to the types that it is given.
    found = model(
        **{name: value.clone() for name, value in (MODELS[case.model].inputs | case.inputs | inputs).items()}
    )
    if "start_logits" in found:
        return torch.stack((found.start_logits, found.end_logits))
    return found.logits if "logits" in found else found.last_hidden_state


def near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * theirs.abs().max().item())


def same_files(ours: Path, theirs: Path) -> None:
    mine, other = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=0, atol=1e-6)
    mine, other = (json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs))
    for config in (mine, other):
        if config.get("modules_to_save"):
            config["modules_to_save"] = sorted(
                set(config["modules_to_save"])
            )  # PEFT adds the heads again at each load
    assert mine == other


@cases
def test_their_prompt_loads_here(case: Case, tmp_path: Path) -> None:
    theirs = made(peft, case)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = loaded(peftrs, case, tmp_path / "theirs")
    near(output(case, ours), output(case, theirs))
    ours.save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")


@cases
def test_our_prompt_loads_there(case: Case, tmp_path: Path) -> None:
    ours = made(peftrs, case)
    shake(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = loaded(peft, case, tmp_path / "ours")
    near(output(case, ours), output(case, theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    same_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("case", [case for case in CASES if case.trains], ids=lambda case: case.id)
def test_training_gives_their_losses(case: Case) -> None:
    theirs, ours = made(peft, case), made(peftrs, case)
    mine, other = named(ours), named(theirs)
    assert mine.keys() == other.keys()
    with torch.no_grad():
        for name in mine:
            mine[name].copy_(other[name])
        if case.config != "AdaptionPromptConfig":
            for name, parameter in theirs.prompt_encoder["default"].named_parameters():
                ours.prompt_encoder["default"].get_parameter(name).copy_(parameter)
    losses: dict[Any, list[float]] = {}
    inputs = MODELS[case.model].inputs | case.inputs | MODELS[case.model].labels
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(named(model).values(), lr=0.5)
        losses[model] = []
        for _ in range(20):
            found = model.train()(**{name: value.clone() for name, value in inputs.items()})
            loss = found.loss if "loss" in found else found.last_hidden_state[..., 0].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[model].append(loss.item())
    assert losses[theirs][-1] < losses[theirs][0]
    assert losses[ours] == pytest.approx(losses[theirs], rel=1e-5)


WAYS: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}]
IN_CACHE = ("PrefixTuningConfig", "CartridgeConfig")
# Where `generate` says where tokens stand (transformers 4), PEFT's T5 counts them without the prompt, as its
# forward does not.
TOLD_POSITIONS = "cache_position" in inspect.signature(T5ForConditionalGeneration.forward).parameters
GENERATING = [
    (case, options)
    for case in CASES
    for options in WAYS
    if case.generates
    and case.model in ("llama", "gpt2", "t5")
    and case.config != "CPTConfig"
    # PEFT cannot without a cache.
    and not (options == {"use_cache": False} and case.model == "llama" and case.config in IN_CACHE)
    and not (TOLD_POSITIONS and case.model == "t5" and case.config in IN_CACHE)
]


@pytest.mark.parametrize(
    ("case", "options"), GENERATING, ids=lambda one: one.id if isinstance(one, Case) else str(one)
)
def test_they_generate_the_same(case: Case, options: dict[str, Any], tmp_path: Path) -> None:
    ours = made(peftrs, case)
    shake(ours)
    ours.save_pretrained(tmp_path)
    texts = []
    for model in (ours, loaded(peft, case, tmp_path)):
        torch.manual_seed(7)
        inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(MASK)} | case.inputs
        texts.append(model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("case", [case for case in CASES if case.model == "t5"], ids=lambda case: case.id)
def test_what_is_generated_follows_from_the_forward(case: Case) -> None:
    model = made(peftrs, case)
    shake(model)
    inputs = {"input_ids": TOKENS, "attention_mask": MASK} | case.inputs
    text = torch.zeros(3, 1, dtype=torch.long)
    for _ in range(5):
        with torch.no_grad():
            scores = model(**inputs, decoder_input_ids=text, use_cache=False).logits[:, -1]
        scores[:, model.config.eos_token_id] = -torch.inf
        text = torch.cat((text, scores.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, min_new_tokens=5), text)
