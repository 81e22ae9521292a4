"""Every method over every base, in this library and in PEFT, one cell for each thing that users do.

    python -m tests.bases.matrix [--only nf4] [--methods lora dora] [--json FILE]

A cell is ✓ where the result is right, – where it was refused in words, ✗ where it is wrong or something
broke; `ours/PEFT`. Right is measured against a float32 model of the dequantized weights with the same
adapter:

- forward: the outputs are those of that model, as near as the format's rounding of activations lets them come
  (15 % of their size where it rounds to 8 bits, 2 to 3 % elsewhere);
- train step: the gradients of all that is trained are those of that model with the library's own outputs in
  the place of its layers' (the gradient is then the weight's: a straight-through estimate where the library
  rounds activations), to 0.1 % of their size, 1 % over AWQ's float16;
- merge: the merged model is nearer to the adapter's outputs than the base alone is; ½ where it goes into 16
  bits only;
- unmerge: every stored bit is as before;
- save/load: the adapter over a new base gives the same outputs;
- checkpointing: the same gradients with activations recomputed, after `prepare_model_for_kbit_training`
  alone;
- compile: a compiled training step gives the same loss; in one graph, or with breaks (✓ᵇ).
"""

import argparse
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import peftrs
from peftrs.bases.quantized import Quantized
from peftrs.bases.resolve import resolve
from tests.bases.formats import ELSEWHERE, FORMATS, torchao_settings
from tests.bases.models import TOKENS, llama

ROWS = TOKENS.unique()[:3].tolist()
"""Some of the tokens that the model is called with."""
PASS, HALF, BREAKS, REFUSED, WRONG = "✓", "½", "✓ᵇ", "–", "✗"
STEPS = ("forward", "train step", "merge", "unmerge", "save/load", "checkpointing", "compile")
BASES = {
    "float32": None, **{name: FORMATS[name] for name in FORMATS if name not in ("bnb-nf4", "hqq-8",
    "torchao-int8-groups")},
    **{name: quantize for name, (package, quantize) in ELSEWHERE.items() if find_spec(package)},
}  # fmt: skip
METHODS: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda lib: lib.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "DoRA": lambda lib: lib.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True),
    "QA-LoRA": lambda lib: lib.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], use_qalora=True, qalora_group_size=8
    ),
    "IA³": lambda lib: lib.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "OFT": lambda lib: lib.OFTConfig(oft_block_size=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "Trainable tokens": lambda lib: lib.TrainableTokensConfig(
        token_indices=ROWS, target_modules=["embed_tokens"]
    ),
    "Prompt tuning": lambda lib: lib.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P-tuning": lambda lib: lib.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "Prefix tuning": lambda lib: lib.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "Multitask prompts": lambda lib: lib.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2, num_ranks=2
    ),
    "CPT": lambda lib: lib.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5, 6], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
    "Cartridge": lambda lib: lib.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "Adaption prompt": lambda lib: lib.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2
    ),
}
INPUTS: dict[str, dict[str, Tensor]] = {"Multitask prompts": {"task_ids": torch.tensor([0, 1])}}
"""What a method's calls are given besides."""


class WrongError(Exception):
    """A result that is not what it should be."""


def base(name: str) -> Any:
    """The small Llama with its linear layers in a format, as transformers marks such models."""
    model, quantize = llama(), BASES[name]
    if quantize is None:
        return model
    for path, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, last = path.rpartition(".")
            setattr(model.model.get_submodule(parent), last, quantize(layer))
    model.is_quantized = True
    if name.startswith("bnb"):
        setattr(model, "is_loaded_in_8bit" if "int8" in name else "is_loaded_in_4bit", True)
    model.quantization_method = {"bnb": "bitsandbytes"}.get(name.partition("-")[0], name.partition("-")[0])
    if name.startswith("torchao"):
        from transformers import TorchAoConfig

        model.hf_quantizer = SimpleNamespace(
            quantization_config=TorchAoConfig(torchao_settings(name.partition("-")[2]))
        )
    return model


class Own(nn.Linear):
    """A layer of the dequantized weight whose output is replaced by the library's own: dense in its gradients
    alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        with torch.no_grad():
            own = self.__dict__["library"].train(self.training)(x)
        return y + (own - y).detach()


def dense(model: Any, *, own: bool = False) -> Any:
    """The same model with the dequantized weights in float32; `own` leaves the quantized layers' outputs what
    they are.
    """
    other = llama()
    for path, layer in model.model.named_modules():
        found = resolve(layer)
        if isinstance(found, Quantized):
            twin = other.model.get_submodule(path)
            twin.weight.data.copy_(found.dense(layer).weight.float())
            if own:
                twin.__class__ = Own
                twin.__dict__["library"] = layer
    return other


def filled(lib: Any, model: Any, method: str) -> Any:
    """The model with an adapter that changes it a good deal."""
    torch.manual_seed(0)
    peft = lib.get_peft_model(model, METHODS[method](lib))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(peft.named_parameters(), key=lambda item: item[0]):
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return peft


def logits(model: Any, **inputs: Tensor) -> Tensor:
    """What the model makes of the tokens."""
    with torch.no_grad():
        return model(input_ids=TOKENS, **inputs).logits.float()


def gradients(model: Any, **inputs: Tensor) -> dict[str, Tensor]:
    """The gradients of all that is trained, by name."""
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS, **inputs).loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    if lost := [name for name, gradient in found.items() if gradient is None or not bool(gradient.any())]:
        raise WrongError(f"{len(lost)} of {len(found)} tensors get no gradient, such as {lost[0]}")
    return {name: gradient.detach().clone() for name, gradient in found.items()}


def near(found: Tensor, expected: Tensor, limit: float, what: str) -> None:
    """Raises `WrongError` where the one is farther from the other than this part of its size."""
    error = float((found - expected).norm() / expected.norm())
    if not error <= limit:
        raise WrongError(f"{what} off by {error:.3g} of its size, allowed {limit:g}")


def stored(model: Any) -> list[Any]:
    """Every number that the frozen model holds, in order."""
    found = []
    for module in model.modules():
        if resolve(module) is not None and not hasattr(module, "base_layer"):
            for name, value in module.state_dict().items():
                parts = [
                    getattr(value, part)
                    for part in ("qdata", "scale")
                    if isinstance(getattr(value, part, None), Tensor)
                ]
                found += [(name, one.detach().clone()) for one in parts or [value] if isinstance(one, Tensor)]
    return found


class Row:
    """One method over one base in one library."""

    def __init__(self, lib: Any, name: str, method: str) -> None:
        self.lib, self.name, self.method, self.inputs = lib, name, method, INPUTS.get(method, {})
        # Formats that round activations as well are as far from their weights as that; so is bitsandbytes'
        # int8 in eval.
        self.limit = (
            0.15 if "dynamic" in name or name == "bnb-int8" else 0.03 if name in ("gptq", "awq") else 0.02
        )
        # With the library's own outputs beneath, what is left is the rounding of float32, or of float16, in
        # which AWQ computes.
        self.exact = 1e-2 if name == "awq" else 1e-3

    def model(self) -> Any:
        return filled(self.lib, base(self.name), self.method)

    def reference(self, *, own: bool = False) -> Any:
        return filled(self.lib, dense(base(self.name), own=own), self.method)

    def logits(self, model: Any) -> Tensor:
        return logits(model, **self.inputs)

    def gradients(self, model: Any) -> dict[str, Tensor]:
        return gradients(model, **self.inputs)

    def run(self) -> dict[str, tuple[str, str]]:
        """Each step's cell and what is to say of it."""
        found: dict[str, tuple[str, str]] = {}
        for step in STEPS:
            try:
                mark = getattr(self, step.replace(" ", "_").replace("/", "_"))()
                found[step] = (mark or PASS, "")
            except (WrongError, torch._dynamo.exc.TorchDynamoException) as error:
                found[step] = (WRONG, str(error)[:200])
            except (peftrs.PeftrsError, NotImplementedError, ValueError, TypeError, ImportError) as error:
                found[step] = (REFUSED, f"{type(error).__name__}: {error}"[:300])
            except Exception as error:
                # Without a method of that name PEFT merges nothing.
                mark = (
                    REFUSED if getattr(error, "name", None) in ("merge_adapter", "unmerge_adapter") else WRONG
                )
                found[step] = (mark, f"{type(error).__name__}: {error}"[:200])
        return found

    def forward(self) -> None:
        near(self.logits(self.model().eval()), self.logits(self.reference().eval()), self.limit, "the output")

    def train_step(self) -> None:
        model, reference = self.model().train(), self.reference(own=True).train()
        found, expected = self.gradients(model), self.gradients(reference)
        for name, gradient in found.items():
            near(gradient, expected[name], self.exact, f"the gradient of {name}")
        torch.optim.AdamW([one for one in model.parameters() if one.requires_grad]).step()

    def merge(self) -> str:
        model, alone = self.model().eval(), logits(base(self.name).train())
        expected = self.logits(self.reference().eval())
        mark = PASS
        try:
            model.merge_adapter()
            merged = logits(model)
        except peftrs.MergeError as error:
            if "dtype" not in str(error):
                raise
            mark, merged = HALF, logits(model.merge_and_unload(dtype=torch.bfloat16).to(torch.bfloat16))
        far, whole = (float((one - expected).norm()) for one in (merged, alone))
        if not far < whole:
            raise WrongError(f"the merged model is off by {far / whole:.3g} of what the adapter changes")
        return mark

    def unmerge(self) -> None:
        model = self.model().eval()
        before = stored(model)
        model.merge_adapter()
        model.unmerge_adapter()
        for (name, one), (_, other) in zip(before, stored(model), strict=True):
            if one.shape != other.shape or not torch.equal(one, other):
                raise WrongError(f"{name} differs after unmerging")

    def save_load(self) -> None:
        model = self.model().train()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = self.lib.PeftModel.from_pretrained(base(self.name), folder).train()
        near(self.logits(again), self.logits(model), 1e-6, "the output of the loaded adapter")

    def checkpointing(self) -> None:
        expected = self.gradients(self.model().train())
        model = self.lib.prepare_model_for_kbit_training(base(self.name))
        if self.name == "float32":
            model.activation_checkpointing_enable()
        found = self.gradients(filled(self.lib, model, self.method).train())
        for name, gradient in found.items():
            near(gradient, expected[name], 1e-4, f"the gradient of {name}")

    def compile(self) -> str:
        given = {"input_ids": TOKENS, "labels": TOKENS, **self.inputs}
        expected = float(self.model().train()(**given).loss)
        for mark, whole in ((PASS, True), (BREAKS, False)):
            torch._dynamo.reset()
            model = self.model().train()
            try:
                loss = torch.compile(model, backend="aot_eager", fullgraph=whole)(**given).loss
                loss.backward()
            except Exception:
                if not whole:
                    raise
                continue
            near(loss.detach(), torch.tensor(expected), 1e-3, "the loss")
            if not all(one.grad is not None for one in model.parameters() if one.requires_grad):
                raise WrongError("something trained gets no gradient")
            return mark
        return WRONG


def rows(bases: list[str], methods: list[str], libs: dict[str, Any], record: Path | None) -> dict[str, Any]:
    """All cells, by base, method, library and step; each row goes into the record, beside what is there, when
    it is done.
    """
    found: dict[str, Any] = json.loads(record.read_text()) if record is not None and record.exists() else {}
    for name in bases:
        for method in methods:
            # PEFT ignores `use_qalora` but for GPTQ.
            asked = {key: lib for key, lib in libs.items() if key == "peftrs" or method != "QA-LoRA"}
            found.setdefault(name, {})[method] = cells = {
                key: Row(lib, name, method).run() for key, lib in asked.items()
            }
            marks = " ".join("/".join(cells[key][step][0] for key in asked).ljust(6) for step in STEPS)
            sys.stdout.write(f"{name:22}{method:18}{marks}\n")
            sys.stdout.flush()
            if record is not None:
                record.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def table(found: dict[str, Any], lib: str) -> str:
    """One library's cells as a Markdown table, a method a row and a base a column: the marks in the order of
    the steps.
    """
    lines = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for method in METHODS:
        rows = [methods.get(method, {}).get(lib, {}) for methods in found.values()]
        if any(rows):
            cells = ["".join(cells[step][0] for step in STEPS if step in cells) for cells in rows]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reasons(found: dict[str, Any], lib: str) -> str:
    """What was said or went wrong in one library's cells that did not pass, each once, with the cells."""
    said: dict[str, list[str]] = {}
    for name, methods in found.items():
        for method, cells in methods.items():
            for step, (mark, reason) in cells.get(lib, {}).items():
                if reason:
                    # Which layer came first, and numbers, are nothing that tells cells apart.
                    text = re.sub(r"model\.layers\S*|\d+\.\d\S*", "…", " ".join(reason.split()))
                    said.setdefault(f"{mark} {text}", []).append(f"{method} over {name}, {step}")
    return "\n".join(
        f"- {text}: {'; '.join(cells[:3])}{f'; and {len(cells) - 3} more' if len(cells) > 3 else ''}"
        for text, cells in said.items()
    )


def main() -> None:
    """Prints the matrix."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="bases to run")
    parser.add_argument("--methods", nargs="*", help="methods to run")
    parser.add_argument("--ours", action="store_true", help="leave PEFT out")
    parser.add_argument(
        "--json", type=Path, help="where to write every cell with its reason, beside what is there"
    )
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    libs: dict[str, Any] = {"peftrs": peftrs}
    if not given.ours:
        import peft

        libs["peft"] = peft
    found = rows(given.only or list(BASES), given.methods or list(METHODS), libs, given.json)
    if given.markdown:
        marks = f"The marks stand for {', '.join(STEPS)}; see `tests/bases/matrix.py`."
        parts = [f"# Every method over every base\n\n{marks}"]
        for lib in libs:
            parts += [f"## {lib}", table(found, lib), reasons(found, lib)]
        given.markdown.write_text("\n\n".join(parts) + "\n")
    broken = [
        f"{name} {method} {step}: {cell[1]}"
        for name, methods in found.items()
        for method, cells in methods.items()
        for step, cell in cells["peftrs"].items()
        if cell[0] == WRONG
    ]
    sys.exit("\n".join(broken) or None)


if __name__ == "__main__":
    main()
