"""Libraries that import `peft` run on peftrs: each test is a process of its own, since they ask once, when
imported.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

PREAMBLE = """
import os, sys, torch
os.environ["HF_HUB_OFFLINE"] = "1"
import peftrs, peftrs.compat
peftrs.compat.install()
torch.manual_seed(0)
torch.set_num_threads(1)
def tiny():
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    vocab_size=32,
        num_attention_heads=2, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0))
tokens = torch.arange(12).view(2, 6)
def run(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits
def stir(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
"""


def process(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_names_and_version_are_ours(tmp_path: Path) -> None:
    process(
        """
        import importlib.metadata, importlib.util
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.tuners.lora.layer import LoraLayer
        assert peft.PeftModel is peftrs.PeftModel
        assert peft.__version__ == importlib.metadata.version("peft") == "0.21.2"
        assert peft.functional.set_adapter and peft.tuners.lora.LoraConfig is peftrs.LoraConfig
        assert importlib.util.find_spec("peft").origin == "peftrs"
        assert importlib.util.find_spec("peft.nonsense") is None
        from transformers.utils import is_peft_available
        from accelerate.utils import is_peft_model
        assert is_peft_available()
        model = peftrs.get_peft_model(tiny(), peftrs.LoraConfig(target_modules=["query"],
        task_type="SEQ_CLS"))
        assert is_peft_model(model)
        layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
        assert isinstance(layer, BaseTunerLayer) and isinstance(layer, LoraLayer)
        assert not isinstance(model.base_model.model.bert.pooler.dense, BaseTunerLayer)
        peftrs.compat.uninstall()
        import peft as real
        assert not getattr(real, "__peftrs__", False)
        """,
        tmp_path,
    )


def test_combining_adapters_has_pefts_names_and_its_linear(tmp_path: Path) -> None:
    process(
        """
        import warnings
        from peft import LoraConfig, get_peft_model
        from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, prune
        from peft.utils.merge_utils import task_arithmetic, ties
        tensors, weights = [torch.ones(2), -3 * torch.ones(2)], torch.tensor([0.5, 1.0])
        assert torch.equal(task_arithmetic(tensors, weights), torch.full((2,), -2.5))
        assert torch.equal(magnitude_prune(tensors, weights, 0.5).abs().sort().values, torch.tensor([0.0,
        2.5]))
        model = get_peft_model(tiny(), LoraConfig(target_modules=["query"], init_lora_weights=False), "a")
        model.add_adapter("b", LoraConfig(target_modules=["query"], init_lora_weights=False))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for name in ("one", "two"):
                model.add_weighted_adapter(["a", "b"], [0.25, 0.25], name, combination_type="linear")
        words = "combination_type='linear' adds up factors"
        assert [str(one.message).startswith(words) for one in told] == [True]
        layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
        for slot in (layer.lora_A, layer.lora_B):
            assert torch.allclose(slot["one"].weight, 0.5 * (slot["a"].weight + slot["b"].weight))
        peftrs.compat.uninstall()
        model.add_weighted_adapter(["a", "b"], [0.25, 0.25], "sum", combination_type="linear")
        assert layer.r["sum"] == 16 and layer.r["one"] == 8
        """,
        tmp_path,
    )


def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    process(
        """
        from transformers import Trainer, TrainingArguments
        rows = [{"input_ids": torch.randint(0, 32, (6,)), "labels": i % 2} for i in range(32)]
        def trainer(steps, **extra):
            model = peftrs.get_peft_model(tiny(), peftrs.LoraConfig(r=4, target_modules=["query", "value"],
            task_type="SEQ_CLS"))
            arguments = TrainingArguments("out", max_steps=steps, per_device_train_batch_size=8, save_steps=4,
            report_to=[],
                logging_steps=1, learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
                label_names=["labels"], **extra)
            return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        first = trainer(8)
        first.train()
        assert sorted(os.listdir("out/checkpoint-8"))[:2] == ["README.md", "adapter_config.json"]
        assert os.path.getsize("out/checkpoint-8/adapter_model.safetensors") < 20_000
        again = trainer(8)
        again.train(resume_from_checkpoint="out/checkpoint-4")
        a, b = run(first.model), run(again.model)
        assert torch.allclose(a, b, atol=1e-6), (a - b).abs().max()
        loaded = peftrs.PeftModel.from_pretrained(tiny(), "out/checkpoint-8")
        assert torch.equal(run(loaded), a)
        assert "eval_loss" in again.evaluate()
        """,
        tmp_path,
    )


def test_models_add_save_and_load_adapters_themselves(tmp_path: Path) -> None:
    process(
        """
        from transformers import BertForSequenceClassification
        tiny().save_pretrained("base")
        model = BertForSequenceClassification.from_pretrained("base")
        plain = run(model)
        model.add_adapter(peftrs.LoraConfig(r=4, target_modules=["query", "value"],
        modules_to_save=["classifier"]), "one")
        assert torch.allclose(run(model), plain, atol=1e-6) and model.active_adapters() == ["one"]
        stir(model)
        changed = run(model)
        assert not torch.allclose(changed, plain, atol=1e-6)
        model.save_pretrained("adapter")
        assert os.path.exists("adapter/adapter_model.safetensors")
        assert os.path.exists("adapter/adapter_config.json")
        other = BertForSequenceClassification.from_pretrained("base")
        other.load_adapter("adapter", "two")
        other.set_adapter("two")
        assert torch.allclose(run(other), changed, atol=1e-6), (run(other) - changed).abs().max()
        straight = BertForSequenceClassification.from_pretrained("adapter")
        assert torch.allclose(run(straight), changed, atol=1e-6)
        other.delete_adapter("two")
        # transformers 4.51 deletes from the adapted layers alone: `modules_to_save`, here the classifier,
        # stays.
        import transformers
        if int(transformers.__version__.split(".")[0]) >= 5:
            assert torch.allclose(run(other), plain, atol=1e-6)
        with torch.no_grad():
            encoded, fresh = (m.eval().bert(input_ids=tokens).pooler_output for m in (other, tiny()))
        assert torch.allclose(encoded, fresh, atol=1e-6)
        """,
        tmp_path,
    )


def test_models_turn_adapters_off_and_on(tmp_path: Path) -> None:
    process(
        """
        model = tiny()
        plain = run(model)
        model.add_adapter(peftrs.LoraConfig(r=4, target_modules=["query", "value"]))
        stir(model)
        changed = run(model)
        model.disable_adapters()
        assert torch.allclose(run(model), plain, atol=1e-6)
        model.enable_adapters()
        assert torch.equal(run(model), changed) and not torch.equal(changed, plain)
        """,
        tmp_path,
    )


def test_installing_too_late_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import peft, peftrs.compat; peftrs.compat.install()"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "PeftrsError" in done.stderr
    assert "before anything that imports it" in done.stderr
