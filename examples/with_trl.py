"""Tunes a chat model with trl, first on conversations (SFT), then on preferences (DPO), and loads the adapter
again.

python examples/with_trl.py                                     # a tiny random model
python examples/with_trl.py --model NAME --steps 200
"""
# ruff: noqa: E402

import argparse
from pathlib import Path

import peftrs.compat

peftrs.compat.install()  # before trl is imported: from here on `peft` is peftrs

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import tiny

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="the base model's folder or repository; by default a tiny random one")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", type=Path, default=Path("output/trl"))
options = parser.parse_args()
base = options.model or tiny.saved(tiny.llama(), options.output / "base")
shared = {
    "max_steps": options.steps,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "logging_steps": 5,
    "report_to": [],
}
shared["bf16"] = torch.cuda.is_available()
texts = tiny.sentences(32)

talk = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": "the cat is good"}] for text in texts
]
tuning = SFTTrainer(
    model=base,
    args=SFTConfig(str(options.output / "sft"), max_length=64, **shared),
    train_dataset=Dataset.from_dict({"messages": talk}),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
)
tuning.train()
merged = tuning.model.merge_and_unload()

liked = {"prompt": texts, "chosen": [" is good"] * len(texts), "rejected": [" is bad"] * len(texts)}
preferring = DPOTrainer(
    model=merged,  # the reference is this model with the new adapter turned off: no second copy in memory
    args=DPOConfig(str(options.output / "dpo"), max_length=64, **shared),
    train_dataset=Dataset.from_dict(liked),
    processing_class=tuning.processing_class,
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
)
preferring.train()
model = preferring.model
model.save_pretrained(options.output / "adapter")

tokens = torch.arange(3, 11, device=model.device)[None]
with torch.no_grad():
    expected = model.eval()(input_ids=tokens).logits
    model.unload().save_pretrained(options.output / "tuned")
    tuned = AutoModelForCausalLM.from_pretrained(options.output / "tuned").to(tokens.device)
    loaded = PeftModel.from_pretrained(tuned, options.output / "adapter")
    apart = (loaded(input_ids=tokens).logits - expected).abs().max().item()
print(f"loaded again: logits at most {apart:.0e} apart")
