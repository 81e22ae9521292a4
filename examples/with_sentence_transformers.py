"""Trains an adapter of a sentence encoder with sentence-transformers, saves it, and loads it onto the base
again.

python examples/with_sentence_transformers.py                   # a tiny random encoder
python examples/with_sentence_transformers.py --model NAME --steps 200
"""
# ruff: noqa: E402

import argparse
from pathlib import Path

import peftrs.compat

peftrs.compat.install()  # before sentence-transformers is imported: from here on `peft` is peftrs

from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import tiny

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="the encoder's folder or repository; by default a tiny random one")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", type=Path, default=Path("output/sentence-transformers"))
options = parser.parse_args()
base = options.model or tiny.saved(tiny.bert(), options.output / "base")
texts = tiny.sentences(32)

model = SentenceTransformer(base)
model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=8, target_modules=["query", "key", "value"]))
trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        str(options.output / "run"),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=5,
        report_to=[],
    ),
    train_dataset=Dataset.from_dict(
        {"anchor": texts, "positive": [text.replace("the", "a") for text in texts]}
    ),
    loss=MultipleNegativesRankingLoss(model),
)
trainer.train()
model.save_pretrained(str(options.output / "adapter"))

loaded = SentenceTransformer(base)
loaded.load_adapter(str(options.output / "adapter"))
apart = abs(loaded.encode(texts) - model.encode(texts)).max()
print(f"loaded again: vectors at most {apart:.0e} apart")
