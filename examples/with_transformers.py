"""Fine-tunes a language model with transformers' Trainer: train, evaluate, save, load again and write.

python examples/with_transformers.py                            # a tiny random model
python examples/with_transformers.py --model NAME --steps 200
"""
# ruff: noqa: E402

import argparse
from pathlib import Path

import peftrs.compat

peftrs.compat.install()  # before transformers is imported: from here on `peft` is peftrs

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import tiny

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="the base model's folder or repository; by default a tiny random one")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", type=Path, default=Path("output/transformers"))
options = parser.parse_args()
base = options.model or tiny.saved(tiny.llama(), options.output / "base")

tokenizer = AutoTokenizer.from_pretrained(base)
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(base),
    LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"),
)
model.print_trainable_parameters()

rows = [{"input_ids": tokenizer(text).input_ids} for text in tiny.sentences(64)]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        eval_strategy="epoch",
        logging_steps=5,
        report_to=[],
    ),
    train_dataset=rows[:48],
    eval_dataset=rows[48:],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
print("loss on text not trained on:", trainer.evaluate()["eval_loss"])
model.save_pretrained(options.output / "adapter")

loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), options.output / "adapter")
prompt = tokenizer("the cat", return_tensors="pt", return_token_type_ids=False).to(loaded.device)
print(
    tokenizer.decode(
        loaded.generate(**prompt, max_new_tokens=6, do_sample=False)[0], skip_special_tokens=True
    )
)
with torch.no_grad():
    apart = (
        (loaded.to(model.device)(**prompt.to(model.device)).logits - model.eval()(**prompt).logits)
        .abs()
        .max()
        .item()
    )
print(f"loaded again: logits at most {apart:.0e} apart")
