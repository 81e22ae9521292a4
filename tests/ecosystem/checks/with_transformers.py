"""transformers over peftrs: the trainers, models that manage adapters themselves, pipelines, generation,
speech and images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
    pipeline,
)
from transformers.utils import is_peft_available

from tests.ecosystem import tiny
from tests.ecosystem.tiny import distance, llama, sentences, stir, t5, tokenizer


def bert(kind: Any = BertForSequenceClassification, **settings: Any) -> Any:
    return tiny.bert(kind, **settings)


HOTSWAP = hasattr(LlamaForCausalLM, "enable_peft_hotswap")
TOKENS = torch.arange(4, 20).view(2, 8)


def rows(count: int = 32) -> list[dict[str, Any]]:
    return [{"input_ids": TOKENS.flatten()[n % 8 : n % 8 + 6], "labels": n % 2} for n in range(count)]


def arguments(folder: Path, kind: Any = TrainingArguments, **settings: Any) -> Any:
    held = {
        "per_device_train_batch_size": 8,
        "report_to": [],
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(str(folder), **{**held, **settings})


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    return model.eval()(**(inputs or {"input_ids": TOKENS})).logits


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if "lora_" in name or "modules_to_save" in name
    }


def test_peft_is_available() -> None:
    assert is_peft_available()


def test_trainer_resumes_with_gradient_checkpointing(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        model = get_peft_model(
            bert(), LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", lora_dropout=0.1)
        )
        settings = {
            "max_steps": 6,
            "save_steps": 3,
            "learning_rate": 1e-2,
            "eval_strategy": "steps",
            "eval_steps": 3,
        }
        settings |= {"gradient_checkpointing": True, "label_names": ["labels"]}
        return Trainer(model, arguments(tmp_path, **settings), train_dataset=rows(), eval_dataset=rows(8))

    first, again = trainer(), trainer()
    first.train()
    saved = tmp_path / "checkpoint-6"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in saved.iterdir()
    }
    assert not (saved / "model.safetensors").exists()
    assert sum("eval_loss" in entry for entry in first.state.log_history) == 2
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in adapter(first.model).items():
        assert distance(value, adapter(again.model)[name]) < 1e-6, name
    loaded = PeftModel.from_pretrained(bert(), saved)
    assert torch.equal(logits(loaded), logits(first.model))


def test_trainer_takes_the_best_checkpoint_back(tmp_path: Path) -> None:
    model = get_peft_model(bert(), LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    settings = {
        "max_steps": 6,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 1e-2,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    }
    settings |= {"load_best_model_at_end": True, "label_names": ["labels"]}
    scores = iter([1.0, 3.0, 2.0])
    trainer = Trainer(
        model,
        arguments(tmp_path, **settings),
        train_dataset=rows(),
        eval_dataset=rows(8),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    best, last = tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"
    assert trainer.state.best_model_checkpoint == str(best)
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), best)), logits(model))
    assert not torch.equal(logits(PeftModel.from_pretrained(bert(), last)), logits(model))


def test_trainer_takes_the_best_prompt_back(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, tokenizer_name_or_path=None)
    model = get_peft_model(llama(), config)
    settings = {
        "max_steps": 6,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 3.0,
    }
    settings |= {"load_best_model_at_end": True, "label_names": ["labels"], "lr_scheduler_type": "constant"}
    texts = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows()]
    trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=texts, eval_dataset=texts[:8])
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), best)), logits(model))


def test_trainer_resumes_several_adapters(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        torch.manual_seed(1)
        model = get_peft_model(bert(), LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
        model.add_adapter(
            "other", LoraConfig(r=2, target_modules=["value"], task_type="SEQ_CLS", init_lora_weights=False)
        )
        model.set_adapter("other")
        return Trainer(
            model, arguments(tmp_path, max_steps=4, save_steps=2, learning_rate=1e-2), train_dataset=rows()
        )

    first, again = trainer(), trainer()
    first.train()
    assert (tmp_path / "checkpoint-2" / "other" / "adapter_model.safetensors").exists()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.model.active_adapters == ["other"]
    for name, value in adapter(first.model).items():
        assert distance(value, adapter(again.model)[name]) < 1e-6, name


def test_seq2seq_trainer_generates(tmp_path: Path) -> None:
    model = get_peft_model(t5(), LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    settings = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "predict_with_generate": True,
        "generation_max_length": 6,
        "save_steps": 3,
    }
    pairs = [
        {"input_ids": TOKENS[0], "attention_mask": torch.ones(8, dtype=torch.long), "labels": TOKENS[1]}
    ] * 8
    trainer = Seq2SeqTrainer(
        model, arguments(tmp_path, Seq2SeqTrainingArguments, **settings), train_dataset=pairs
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    predicted = trainer.predict(pairs[:2]).predictions
    loaded = PeftModel.from_pretrained(t5(), tmp_path / "checkpoint-3").eval()
    expected = loaded.generate(
        input_ids=TOKENS[:1], attention_mask=torch.ones(1, 8, dtype=torch.long), max_length=6
    )
    assert predicted[0, : expected.shape[1]].tolist() == expected[0].tolist()


class TestModelsThatManageAdapters:
    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        bert().save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    @pytest.fixture
    def fresh(self, base: Path) -> Any:
        return BertForSequenceClassification.from_pretrained(base)

    def test_add_set_disable_delete(self, fresh: Any) -> None:
        plain = logits(fresh)
        fresh.add_adapter(LoraConfig(r=4, target_modules=["query", "value"]), "one")
        assert fresh.active_adapters() == ["one"]
        assert all(
            ("lora_" in name) == parameter.requires_grad for name, parameter in fresh.named_parameters()
        )
        stir(fresh)
        one = logits(fresh)
        fresh.add_adapter(LoraConfig(r=2, target_modules=["key"], init_lora_weights=False), "two")
        two = logits(fresh)
        fresh.set_adapter(["one", "two"])
        both = logits(fresh)
        assert min(distance(both, one), distance(both, two), distance(one, two), distance(one, plain)) > 1e-4
        assert fresh.active_adapters() == ["one", "two"]
        fresh.disable_adapters()
        assert torch.equal(logits(fresh), plain)
        fresh.enable_adapters()
        assert torch.equal(logits(fresh), both)
        fresh.set_adapter("one")
        assert torch.equal(logits(fresh), one)
        assert set(fresh.get_adapter_state_dict("two")) == set(
            fresh.get_adapter_state_dict("two", fresh.state_dict())
        )
        fresh.delete_adapter("two")
        assert torch.equal(logits(fresh), one)
        with pytest.raises(ValueError, match="two"):
            fresh.set_adapter("two")
        fresh.delete_adapter("one")
        assert torch.equal(logits(fresh), plain)
        fresh.add_adapter(LoraConfig(r=4, target_modules=["query"], init_lora_weights=False), "three")
        assert fresh.active_adapters() == ["three"]
        assert distance(logits(fresh), plain) > 1e-4

    def test_save_and_load(self, fresh: Any, base: Path, tmp_path: Path) -> None:
        fresh.add_adapter(
            LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"]), "one"
        )
        stir(fresh)
        changed = logits(fresh)
        fresh.save_pretrained(tmp_path / "adapter")
        assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert all(
            name.startswith("base_model.model.")
            for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        )
        other = BertForSequenceClassification.from_pretrained(base)
        other.add_adapter(LoraConfig(r=2, target_modules=["key"]), "first")
        other.load_adapter(str(tmp_path / "adapter"), "two")
        assert other.active_adapters() == ["two"]
        assert distance(logits(other), changed) < 1e-6
        trained = BertForSequenceClassification.from_pretrained(base)
        trained.load_adapter(str(tmp_path / "adapter"), is_trainable=True)
        assert any(parameter.requires_grad for parameter in trained.parameters())
        for kind in (BertForSequenceClassification, AutoModelForSequenceClassification):
            assert distance(logits(kind.from_pretrained(tmp_path / "adapter")), changed) < 1e-6
        assert distance(logits(PeftModel.from_pretrained(bert(), tmp_path / "adapter")), changed) < 1e-6

    def test_load_tensors_from_memory(self, fresh: Any) -> None:
        config = LoraConfig(r=4, target_modules=["query"], init_lora_weights=False)
        source = get_peft_model(bert(), config)
        state = {
            name.removeprefix("base_model.model."): value
            for name, value in get_peft_model_state_dict(source).items()
        }
        fresh.load_adapter(peft_config=config, adapter_state_dict=state)
        assert distance(logits(fresh), logits(source)) < 1e-6

    @pytest.mark.skipif(not HOTSWAP, reason="this transformers swaps no adapters")
    def test_hotswap(self, fresh: Any, base: Path, tmp_path: Path) -> None:
        expected = {}
        for name in ("one", "two"):
            model = BertForSequenceClassification.from_pretrained(base)
            model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
            expected[name] = logits(model)
            model.save_pretrained(tmp_path / name)
        fresh.load_adapter(str(tmp_path / "one"), "default")
        assert distance(logits(fresh), expected["one"]) < 1e-6
        fresh.load_adapter(str(tmp_path / "two"), "default", hotswap=True)
        assert distance(logits(fresh), expected["two"]) < 1e-6

    @pytest.mark.skipif(not HOTSWAP, reason="this transformers swaps no adapters")
    def test_hotswap_of_a_compiled_model(self, fresh: Any, base: Path, tmp_path: Path) -> None:
        expected = {}
        for name in ("one", "two", "three"):
            model = BertForSequenceClassification.from_pretrained(base)
            # Of one rank and strength: transformers 5 puts the tensors in itself, and no others fit.
            model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
            expected[name] = logits(model)
            model.save_pretrained(tmp_path / name)
        fresh.enable_peft_hotswap(target_rank=4)
        fresh.load_adapter(str(tmp_path / "one"), "default")
        fresh.compile()
        assert distance(logits(fresh), expected["one"]) < 1e-6
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in ("two", "three", "one"):
                fresh.load_adapter(str(tmp_path / name), "default", hotswap=True)
                assert distance(logits(fresh), expected[name]) < 1e-6


def test_pipelines(tmp_path: Path) -> None:
    model = get_peft_model(
        llama(),
        LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    words = tokenizer()
    options = {"max_new_tokens": 4, "do_sample": False}
    written = pipeline("text-generation", model=model, tokenizer=words, device="cpu")(
        "the cat sat", **options
    )[0]["generated_text"]
    merged = pipeline("text-generation", model=model.merge_and_unload(), tokenizer=words, device="cpu")(
        "the cat sat", **options
    )
    assert written == merged[0]["generated_text"]
    assert written.startswith("the cat sat")
    judge = get_peft_model(
        bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    )
    judged = pipeline("text-classification", model=judge, tokenizer=words, device="cpu")(sentences(2))
    inputs = words(sentences(2), return_tensors="pt", return_token_type_ids=False)
    best = logits(judge, **inputs).softmax(-1).max(-1)
    assert [one["label"] for one in judged] == [f"LABEL_{place}" for place in best.indices]
    # A folder with an adapter alone is a model to a pipeline: the config says on which base.
    llama().save_pretrained(tmp_path / "base")
    based = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    based.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    based.save_pretrained(tmp_path / "adapter")
    words.save_pretrained(tmp_path / "base")
    loaded = pipeline("text-generation", model=str(tmp_path / "adapter"), device="cpu")
    assert torch.equal(logits(loaded.model), logits(based))


def test_generate_greedily_by_beams_and_by_sampling() -> None:
    model = get_peft_model(
        llama(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    plain = llama().eval()
    for options in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}):
        settings = {
            "input_ids": TOKENS,
            "attention_mask": torch.ones_like(TOKENS),
            "max_new_tokens": 6,
            **options,
        }
        torch.manual_seed(0)
        adapted = model.generate(**settings)
        torch.manual_seed(0)
        with model.disable_adapter():
            turned_off = model.generate(**settings)
        torch.manual_seed(0)
        assert torch.equal(turned_off, plain.generate(**settings))
        model.merge_adapter()
        torch.manual_seed(0)
        assert torch.equal(model.generate(**settings), adapted)
        model.unmerge_adapter()


def test_a_speech_model_trains_and_writes(tmp_path: Path) -> None:
    def whisper() -> WhisperForConditionalGeneration:
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 48,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "num_mel_bins": 8,
            "dropout": 0.0,
        }
        sizes |= {
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
        }
        tokens = {
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
        }
        config = WhisperConfig(
            **sizes, **tokens, max_source_positions=30, max_target_positions=24, suppress_tokens=None
        )
        return WhisperForConditionalGeneration(config)

    model = get_peft_model(
        whisper(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["conv1"])
    )
    examples = [{"input_features": torch.randn(8, 60), "labels": torch.arange(3, 9)} for _ in range(8)]
    settings = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "save_steps": 4,
    }
    settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = Seq2SeqTrainer(
        model, arguments(tmp_path, Seq2SeqTrainingArguments, **settings), train_dataset=examples
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    features = torch.stack([one["input_features"] for one in examples[:2]])
    written = model.eval().generate(input_features=features, max_new_tokens=5)
    loaded = PeftModel.from_pretrained(whisper(), tmp_path / "checkpoint-4").eval()
    assert torch.equal(loaded.generate(input_features=features, max_new_tokens=5), written)
    inputs = {"input_features": features, "decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}
    expected = logits(loaded, **inputs)
    assert distance(logits(loaded.merge_and_unload(), **inputs), expected) < 1e-5


def test_an_image_model_trains(tmp_path: Path) -> None:
    def vit() -> ViTForImageClassification:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3))

    attention = "query" if any(name.endswith(".query") for name, _ in vit().named_modules()) else "q_proj"
    model = get_peft_model(
        vit(), LoraConfig(r=4, target_modules=[attention, "projection"], modules_to_save=["classifier"])
    )
    examples = [{"pixel_values": torch.randn(3, 16, 16), "labels": n % 3} for n in range(12)]
    settings = {
        "max_steps": 6,
        "learning_rate": 2e-2,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "save_steps": 6,
    }
    trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=examples, eval_dataset=examples)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    pixels = torch.stack([one["pixel_values"] for one in examples])
    loaded = PeftModel.from_pretrained(vit(), tmp_path / "checkpoint-6")
    expected = logits(model, pixel_values=pixels)
    assert torch.equal(logits(loaded, pixel_values=pixels), expected)
    assert distance(logits(loaded.merge_and_unload(), pixel_values=pixels), expected) < 1e-5
