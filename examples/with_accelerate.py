"""Fine-tunes a language model in a loop of one's own with accelerate, on one device or many.

python examples/with_accelerate.py                              # a tiny random model
accelerate launch --num_processes 2 examples/with_accelerate.py --model NAME --steps 200
"""
# ruff: noqa: E402

import argparse
from itertools import cycle, islice
from pathlib import Path

import peftrs.compat

peftrs.compat.install()  # before accelerate is imported: from here on `peft` is peftrs

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="the base model's folder or repository; by default a tiny random one")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", type=Path, default=Path("output/accelerate"))
options = parser.parse_args()
accelerator = Accelerator()
with accelerator.main_process_first():
    base = options.model or tiny.saved(tiny.llama(), options.output / "base")

tokenizer = AutoTokenizer.from_pretrained(base)
tokens = tokenizer(tiny.sentences(64), return_tensors="pt", padding=True).input_ids
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
)
optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
model, optimizer, loader = accelerator.prepare(
    model, optimizer, DataLoader(list(tokens), batch_size=8, shuffle=True)
)

model.train()
for step, batch in enumerate(islice(cycle(loader), options.steps)):
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        accelerator.print(f"step {step}: loss {loss.item():.3f}")

trained = accelerator.unwrap_model(model)
state = accelerator.get_state_dict(model)
trained.save_pretrained(
    options.output / "adapter", is_main_process=accelerator.is_main_process, state_dict=state
)
accelerator.wait_for_everyone()

loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), options.output / "adapter").to(
    accelerator.device
)
with torch.no_grad():
    some = tokens[:4].to(accelerator.device)
    apart = (loaded(input_ids=some).logits - trained.eval()(input_ids=some).logits).abs().max().item()
accelerator.print(f"loaded again: logits at most {apart:.0e} apart")
accelerator.end_training()
