"""`merge_and_unload(dtype=...)` gives a model that is of this dtype as if it had been loaded in it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftrs
from peftrs import LoraConfig, MergeError, get_peft_model
from peftrs.model.recast import recast
from tests.model import tiny

NEW = int(transformers.__version__.split(".")[0]) >= 5
NARROW = (torch.bfloat16, torch.float16)
KINDS = (*NARROW, torch.float32)
ALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "intermediate_size": 48,
}


def t5() -> Any:
    """Wants `wo` in float32 in a model of float16."""
    settings = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(settings)


def gptj() -> Any:
    """Has buffers that checkpoints do not hold."""
    return transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    )


def resnet() -> Any:
    """Has buffers that checkpoints hold."""
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    )


def llava() -> Any:
    """Is made of two models with configs of their own."""
    eyes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 8,
    }
    settings = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**ALL),
        vision_config=transformers.CLIPVisionConfig(image_size=32, **eyes),
        image_token_index=5,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(settings)


MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "llama": (tiny.llama, "all-linear"),
    "tied": (lambda: tiny.llama(tied=True), ["q_proj"]),
    "bert": (tiny.bert, ["query"]),
    "t5": (t5, ["q", "wo"]),
    "gptj": (gptj, ["q_proj"]),
    "resnet": (resnet, ["classifier.1"]),
    "llava": (llava, ["q_proj"]),
}


WIDE = {
    **{(name, dtype): "inv_freq" for name in ("llama", "tied", "llava") for dtype in NARROW},
    ("t5", torch.float16): ".wo.",
}
"""What stays in float32."""


def loaded(kind: type, folder: Path, dtype: torch.dtype) -> Any:
    """The model in a folder, in this dtype."""
    return kind.from_pretrained(folder, **{"dtype" if NEW else "torch_dtype": dtype})  # type: ignore[attr-defined]


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Of every parameter and buffer."""
    return {name: one.dtype for name, one in (*model.named_parameters(), *model.named_buffers())}


def said(config: Any) -> torch.dtype:
    """The dtype that a config of transformers says."""
    return config.dtype if hasattr(config, "dtype") else config.torch_dtype


def adapted(model: nn.Module, targets: Any = "all-linear", **options: Any) -> Any:
    found = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **options))
    tiny.shake(found)
    return found.eval()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_the_dtype_that_loading_would_give_it(
    name: str, first: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    make, targets = MODELS[name]
    make().save_pretrained(tmp_path)
    kind = type(make())
    merged = adapted(loaded(kind, tmp_path, first), targets).merge_and_unload(dtype=dtype)
    expected = loaded(kind, tmp_path, dtype)
    assert dtypes(merged) == dtypes(expected)
    if (name, dtype) in WIDE:
        wide = [one for one, kind in dtypes(merged).items() if kind is torch.float32]
        assert wide
        assert all(WIDE[name, dtype] in one for one in wide)
    for config, other in ((merged.config, expected.config), *_inner(merged.config, expected.config)):
        assert said(config) is said(other) is dtype


def _inner(config: Any, other: Any) -> list[tuple[Any, Any]]:
    return [
        (getattr(config, name), getattr(other, name))
        for name in config.sub_configs
        if getattr(config, name, None) is not None
    ]


@pytest.mark.parametrize("name", ["llama", "tied", "t5"])
def test_the_model_runs_generates_and_is_the_same_once_saved_and_loaded(name: str, tmp_path: Path) -> None:
    make, targets = MODELS[name]
    model = adapted(make(), targets)
    asked = {"input_ids": tiny.TOKENS, "attention_mask": torch.ones_like(tiny.TOKENS)}
    given = {"decoder_input_ids": tiny.TOKENS} if name == "t5" else {}
    with torch.no_grad():
        expected = model(**asked, **given).logits
    merged: Any = model.merge_and_unload(dtype=torch.bfloat16)
    with torch.no_grad():
        found = merged(**asked, **given).logits
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    written = merged.generate(**asked, max_new_tokens=3, do_sample=False, pad_token_id=0)
    merged.save_pretrained(tmp_path)
    again = loaded(type(merged), tmp_path, torch.bfloat16)
    assert {one.dtype for one in again.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(again(**asked, **given).logits, found)
    assert torch.equal(again.generate(**asked, max_new_tokens=3, do_sample=False, pad_token_id=0), written)


@pytest.mark.filterwarnings("ignore:2 tensors that other modules share:peftrs.PeftrsWarning")
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "lm_head"]], ids=["beside", "both"])
def test_ties_stay_ties(targets: list[str]) -> None:
    merged = adapted(tiny.llama(tied=True), targets, ensure_weight_tying=len(targets) > 1).merge_and_unload(
        dtype=torch.bfloat16
    )
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.lm_head.weight.dtype is torch.bfloat16
    assert merged.config.tie_word_embeddings


def test_buffers_that_modules_share_stay_shared() -> None:
    model = tiny.stack()
    table = torch.ones(3)
    for layer in model.layers:
        layer.register_buffer("table", table)
    merged: Any = adapted(model, ["head"]).merge_and_unload(dtype=torch.bfloat16)
    assert merged.layers[0].table is merged.layers[1].table
    assert merged.layers[0].table.dtype is torch.bfloat16


@pytest.mark.parametrize("earlier", [False, True], ids=["at once", "merged before"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_narrow_base_is_merged_in_the_wider_dtype(method: str, earlier: bool) -> None:
    model = adapted(tiny.stack().to(torch.bfloat16), ["layers.0"], use_dora=method == "dora")
    layer = model.base_model.model.layers[0]
    weight = layer.base_layer.weight.detach().double()
    change = (
        layer.scaling["default"]
        * layer.lora_B["default"].weight.double()
        @ layer.lora_A["default"].weight.double()
    )
    expected = weight + change
    if method == "dora":
        magnitude = layer.lora_magnitude_vector["default"].detach().double()
        expected *= (magnitude / expected.norm(dim=1))[:, None]
    if earlier:
        model.merge_adapter()
        with pytest.warns(peftrs.PeftrsWarning, match="merged already"):
            merged = model.merge_and_unload(dtype=torch.float32)
    else:
        merged = model.merge_and_unload(dtype=torch.float32)
    assert dtypes(merged) == dict.fromkeys(dtypes(merged), torch.float32)
    torch.testing.assert_close(merged.layers[0].weight, expected.float(), rtol=1e-6, atol=1e-7)
    assert not torch.equal(merged.layers[0].weight, expected.to(torch.bfloat16).float())


class Mixed(nn.Module):
    """A user's own module, of which a model of transformers is a part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.llama()
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 2)
        self.register_buffer("shift", torch.zeros(64), persistent=False)
        self.register_buffer("turns", torch.ones(2, dtype=torch.complex64))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(tokens).logits[:, -1] + self.shift))


def test_a_module_around_a_model_goes_along_whole() -> None:
    merged = adapted(Mixed(), ["q_proj", "head"]).merge_and_unload(dtype=torch.bfloat16)
    found = dtypes(merged)
    kept = {
        name.replace(".original_", "."): kind for name, kind in found.items() if kind is not torch.bfloat16
    }
    assert kept == {
        "inner.model.rotary_emb.inv_freq": torch.float32,
        "norm.num_batches_tracked": torch.int64,
        "turns": torch.complex64,
    }
    assert said(merged.inner.config) is torch.bfloat16
    assert merged(tiny.TOKENS).dtype is torch.bfloat16


def test_modules_that_were_trained_whole_and_gradients_go_along() -> None:
    model = adapted(
        tiny.llama().to(torch.bfloat16), ["q_proj"], modules_to_save=["lm_head"], bias="none"
    ).float()
    model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
    merged = model.merge_and_unload(dtype=torch.bfloat16)
    head = merged.lm_head.weight
    assert head.dtype is head.grad.dtype is torch.bfloat16
    assert tiny.logits(merged).dtype is torch.bfloat16


class Odd(transformers.LlamaForCausalLM):
    """A class that is not built from its config alone."""

    def __init__(self, config: Any, more: int) -> None:
        super().__init__(config)
        self.more = more


def test_what_checkpoints_do_not_hold_keeps_its_dtype_where_the_class_cannot_be_built() -> None:
    plain = tiny.llama()
    model = Odd(plain.config, 3)
    model.register_buffer("held", torch.ones(2))
    merged = adapted(model).merge_and_unload(dtype=torch.bfloat16)
    expected = adapted(plain).merge_and_unload(dtype=torch.bfloat16)
    assert dtypes(merged) == {**dtypes(expected), "held": torch.bfloat16}
    assert torch.float32 in dtypes(merged).values()


def test_recasting_draws_no_random_numbers_and_takes_nothing_from_the_config() -> None:
    model = tiny.llama()
    before, state = copy.deepcopy(model.config), torch.get_rng_state()
    recast(model, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() is torch.float32
    recast(model, said(before) or torch.float32)
    assert model.config.to_dict() == {
        **before.to_dict(),
        **{key: value for key, value in model.config.to_dict().items() if "dtype" in key},
    }


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16", torch.complex64], ids=str)
def test_what_is_no_dtype_to_compute_in_is_refused(dtype: Any) -> None:
    model = adapted(tiny.llama())
    before = tiny.fingerprint(model)
    with pytest.raises(MergeError, match=r"no model computes in dtype=.*; hint: torch\.bfloat16"):
        model.merge_and_unload(dtype=dtype)
    assert tiny.fingerprint(model) == before


@pytest.mark.parametrize("method", ["lora", "dora", "base", "whole"])
def test_numbers_beyond_the_dtype_are_refused_with_nothing_changed(method: str) -> None:
    whole = {"modules_to_save": ["head"]} if method == "whole" else {}
    model = adapted(tiny.stack(), ["layers.0"], use_dora=method == "dora", **whole)
    inner = model.base_model.model
    with torch.no_grad():
        if method == "base":
            inner.layers[1].weight[0, 0] = 7e4
            inner.layers[1].weight[0, 1] = math.inf  # was so before, and stays
        elif method == "whole":
            inner.head.modules_to_save["default"].bias[0] = -7e4
        elif method == "dora":
            inner.layers[0].lora_magnitude_vector["default"].fill_(1e6)
        else:
            inner.layers[0].lora_B["default"].weight.fill_(1e6)
    before = tiny.fingerprint(model)
    at = {"base": r"layers\.1\.weight' hold", "whole": r"head.*bias' hold"}.get(
        method, r"layers\.0: merging 'default' gives"
    )
    with pytest.raises(MergeError, match=rf"{at}.*beyond.*wider dtype"):
        model.merge_and_unload(dtype=torch.float16)
    assert tiny.fingerprint(model) == before
    merged = model.merge_and_unload(dtype=torch.bfloat16)
    assert {one.dtype for one in merged.parameters()} == {torch.bfloat16}


def test_a_wider_dtype_takes_what_would_not_fit_the_base() -> None:
    model = adapted(tiny.stack().to(torch.float16), ["layers.0"])
    with torch.no_grad():
        model.base_model.model.layers[0].lora_B["default"].weight.fill_(1e6)
    with pytest.raises(MergeError, match=r"beyond torch\.float16"):
        model.merge_and_unload()
    merged = model.merge_and_unload(dtype=torch.float32)
    assert bool(merged.layers[0].weight.isfinite().all())
    assert float(merged.layers[0].weight.abs().max()) > 7e4


def test_parameters_that_zero_has_in_parts_are_refused() -> None:
    model = adapted(tiny.stack(), ["layers.0"])
    head: Any = model.base_model.model.head.weight
    head.ds_id, head.ds_numel = 0, 10 * head.numel()
    before = tiny.fingerprint(model)
    with pytest.raises(MergeError, match=r"ZeRO-3 keeps the dtype .* hint: merge without `dtype`"):
        model.merge_and_unload(dtype=torch.bfloat16)
    assert tiny.fingerprint(model) == before
    model.merge_and_unload()


@pytest.mark.parametrize(
    ("first", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_weights_that_are_elsewhere_go_along(
    place: str, first: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny.llama().to(first)
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
    merged = adapted(model).merge_and_unload(dtype=dtype)
    expected = adapted(tiny.llama().to(first)).merge_and_unload(dtype=dtype)
    assert {(one.dtype, one.is_meta) for one in merged.parameters()} == {(dtype, True)}
    assert torch.equal(tiny.logits(merged), tiny.logits(expected))
    layer = merged.model.layers[0].mlp.up_proj
    assert layer._hf_hook.weights_map["weight"].dtype is dtype
