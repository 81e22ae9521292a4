"""Quantized checkpoints as bases: read as the libraries that made them read them, to the bit, and merged into
floats.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftrs
from peftrs._native import merge_main

LAYERS = ("model.layers.0.up", "model.layers.0.down")
SHAPE = (96, 128)

pytestmark = pytest.mark.filterwarnings("ignore")


def adapter(folder: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """An adapter that changes nothing but one entry, so that all others show the base; returns each layer's
    change.
    """
    tensors, changes = {}, {}
    for name, (rows, columns) in shapes.items():
        up, down = torch.zeros(rows, 1), torch.zeros(1, columns)
        up[3, 0], down[0, 5] = 1.0, 0.5
        tensors |= {
            f"base_model.model.{name}.lora_A.weight": down,
            f"base_model.model.{name}.lora_B.weight": up,
        }
        changes[name] = up @ down
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    peftrs.LoraConfig(r=1, lora_alpha=1, target_modules=list(shapes)).save_pretrained(folder)
    return changes


def merged(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], expected: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Merges an adapter into the checkpoint and holds the outcome to what the weights are said to be."""
    base = tmp_path / "base"
    base.mkdir()
    rest = {"model.norm.weight": torch.ones(4, dtype=torch.bfloat16)}
    save_file(
        {name: tensor.contiguous() for name, tensor in (tensors | rest).items()}, base / "model.safetensors"
    )
    (base / "config.json").write_text(json.dumps(config))
    (base / "quantize_config.json").write_text("{}")
    changes = adapter(tmp_path / "adapter", {name: tuple(weight.shape) for name, weight in expected.items()})
    assert merge_main([str(base), str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--check"]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {f"{name}.weight" for name in expected} | rest.keys()
    for name, weight in expected.items():
        sum_ = (weight.double() + changes[name].double()).to(weight.dtype)
        assert found[f"{name}.weight"].dtype == weight.dtype
        assert torch.equal(found[f"{name}.weight"], sum_), name
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {key: value for key, value in config.items() if key != "quantization_config"}
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    return found


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes(tmp_path: Path, kind: str, dtype: torch.dtype, double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    tensors, expected = {}, {}
    for seed, name in enumerate(LAYERS):
        weight = 0.05 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        layer = bnb.nn.Linear4bit(SHAPE[1], SHAPE[0], bias=False, quant_type=kind, compress_statistics=double)
        layer.weight = bnb.nn.Params4bit(
            weight.to(dtype), requires_grad=False, quant_type=kind, compress_statistics=double, blocksize=64
        ).to("cpu")
        tensors |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
        expected[name] = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert any("quant_state" in name for name in tensors)
    assert any("nested_absmax" in name for name in tensors) is double
    config = {
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    merged(tmp_path, tensors, config, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eight_bits_of_bitsandbytes(tmp_path: Path, dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    tensors, expected = {}, {}
    for seed, name in enumerate(LAYERS):
        weight = 0.05 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        tensors |= {
            f"{name}.weight": codes,
            f"{name}.SCB": scales,
            f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        expected[name] = bnb.functional.int8_vectorwise_dequant(codes, scales).to(dtype)
    text = str(dtype).removeprefix("torch.")
    config = {
        "torch_dtype": text,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    }
    merged(tmp_path, tensors, config, expected)


def packed(codes: Tensor, bits: int, dim: int, order: tuple[int, ...]) -> Tensor:
    """Codes of a few bits in 32-bit words along a dimension; `order` says which of them stands at each place
    of a word.
    """
    if bits == 3:
        # A stream of bits, across the edges of words.
        stream = (codes.movedim(dim, -1).unsqueeze(-1) >> torch.arange(3)) & 1
        stream = stream.reshape(*stream.shape[:-2], -1, 32).long() << torch.arange(32)
        words = stream.sum(-1).movedim(-1, dim)
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    count = 32 // bits
    groups = codes.unfold(dim, count, count)
    words = sum(groups[..., which].long() << (bits * place) for place, which in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int, form: str, act_order: bool) -> None:
    rows, columns, group = 96, 128, 32
    tensors, expected = {}, {}
    for seed, name in enumerate(LAYERS):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 2**bits, (columns, rows), generator=generator)
        zeros = torch.randint(1, 2**bits, (columns // group, rows), generator=generator)
        scales = (0.01 * torch.rand(columns // group, rows, generator=generator)).half()
        index = torch.arange(columns) // group
        if act_order:
            index = index[torch.randperm(columns, generator=generator)]
        order = tuple(range(32 // bits))
        tensors |= {
            f"{name}.qweight": packed(codes, bits, 0, order),
            f"{name}.qzeros": packed(zeros - int(form == "gptq"), bits, 1, order),
            f"{name}.scales": scales,
            f"{name}.g_idx": index.int(),
        }
        expected[name] = (scales[index] * (codes - zeros[index]).half()).mT.contiguous()
    said = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": act_order,
        "checkpoint_format": form,
    }
    merged(tmp_path, tensors, {"torch_dtype": "float16", "quantization_config": said}, expected)


def test_awq(tmp_path: Path) -> None:
    rows, columns, group = 96, 128, 64
    tensors, expected = {}, {}
    for seed, name in enumerate(LAYERS):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (columns, rows), generator=generator)
        zeros = torch.randint(0, 16, (columns // group, rows), generator=generator)
        scales = (0.01 * torch.rand(columns // group, rows, generator=generator)).half()
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors |= {
            f"{name}.qweight": packed(codes, 4, 1, order),
            f"{name}.qzeros": packed(zeros, 4, 1, order),
            f"{name}.scales": scales,
        }
        index = torch.arange(columns) // group
        expected[name] = (scales[index] * (codes - zeros[index]).half()).mT.contiguous()
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    merged(tmp_path, tensors, {"torch_dtype": "float16", "quantization_config": said}, expected)


def test_awq_of_the_other_side(tmp_path: Path) -> None:
    """As AutoAWQ's `WQLinear_GEMV` stores it, with a last word of zeros that is not full."""
    rows, columns, group = 96, 320, 32
    tensors, expected = {}, {}
    for seed, name in enumerate(LAYERS):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (rows, columns), generator=generator)
        zeros, scales = torch.zeros(rows, 16, dtype=torch.long), torch.zeros(rows, 16, dtype=torch.float16)
        zeros[:, : columns // group] = torch.randint(0, 16, (rows, columns // group), generator=generator)
        scales[:, : columns // group] = (
            0.01 * torch.rand(rows, columns // group, generator=generator)
        ).half()
        tensors |= {
            f"{name}.qweight": packed(codes, 4, 1, tuple(range(8))),
            f"{name}.qzeros": packed(zeros, 4, 1, tuple(range(8))),
            f"{name}.scales": scales,
        }
        index = torch.arange(columns) // group
        expected[name] = scales[:, index] * (codes - zeros[:, index]).half()
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemv", "zero_point": True}
    merged(tmp_path, tensors, {"torch_dtype": "float16", "quantization_config": said}, expected)


def woven(codes: Tensor) -> Tensor:
    """Codes `(out, in)` as AutoAWQ's `WQLinear_GEMVFast` stores them, `(out / 4, in)`, step by step as its
    packing goes.
    """
    rows, columns = codes.shape
    blocks = codes.view(rows, columns // 32, 4, 4, 2).transpose(
        2, 3
    )  # pairs of each eight inputs come together
    blocks = blocks.reshape(rows, columns // 32, 4, 4, 2).transpose(
        3, 4
    )  # even ones of eight before odd ones
    runs = blocks.reshape(rows // 4, 4, columns // 64, 64).transpose(1, 2)  # four outputs in a run
    fours = runs.reshape(rows // 4, columns, 4)
    words = sum(fours[..., place] << 4 * place for place in range(4))
    return torch.where(words < 2**15, words, words - 2**16).short()


@pytest.mark.parametrize("group", [64, 128, -1])
def test_awq_of_woven_rows(tmp_path: Path, group: int) -> None:
    """As AutoAWQ's `WQLinear_GEMVFast` stores it, with groups at the end that are not there."""
    rows, columns = 96, 384
    size = group if group > 0 else columns
    groups = columns // size
    tensors, expected = {}, {}
    for seed, name in enumerate(LAYERS):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (rows, columns), generator=generator)
        scales, zeros = torch.zeros(2, 8, rows, dtype=torch.float16)
        scales[:groups] = (0.01 * torch.rand(groups, rows, generator=generator)).half()
        zeros[:groups] = -(
            scales[:groups].float() * torch.randint(0, 16, (groups, rows), generator=generator)
        ).half()
        tensors |= {f"{name}.qweight": woven(codes), f"{name}.scales": scales, f"{name}.qzeros": zeros}
        index = torch.arange(columns) // size
        expected[name] = (codes * scales.mT[:, index].float() + zeros.mT[:, index].float()).half()
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemv_fast", "zero_point": True}
    merged(tmp_path, tensors, {"torch_dtype": "float16", "quantization_config": said}, expected)


def test_experts_in_floats_of_four_bits(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    name, generator = "model.layers.0.mlp.experts.gate_up_proj", torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 40, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 135, (3, 40, 2), generator=generator, dtype=torch.uint8)
    weight = mxfp4.convert_moe_packed_tensors(blocks, scales)
    assert weight.shape == (3, 64, 40)
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, base / "model.safetensors")
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (base / "config.json").write_text(json.dumps(config))
    down, up = torch.zeros(3, 40), torch.zeros(64, 3)
    path = name.removesuffix(".gate_up_proj")
    (tmp_path / "adapter").mkdir()
    tensors = {f"base_model.model.{path}.lora_A.weight": down, f"base_model.model.{path}.lora_B.weight": up}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = peftrs.LoraConfig(
        r=1, lora_alpha=1, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]
    )
    settings.save_pretrained(tmp_path / "adapter")
    assert merge_main([str(base), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {name}
    assert torch.equal(found[name], weight)


@pytest.mark.parametrize("source", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scaled", ["block", "row", "whole"])
def test_floats_of_eight_bits(tmp_path: Path, scaled: str, source: torch.dtype) -> None:
    tensors, expected = {}, {}
    for seed, name in enumerate(LAYERS):
        generator = torch.Generator().manual_seed(seed)
        weight = (10 * torch.randn(SHAPE, generator=generator)).to(source)
        shape = {"block": (2, 2), "row": (96, 1), "whole": (1,)}[scaled]
        scales = 0.01 * torch.rand(shape, generator=generator)
        spread = scales
        if scaled == "block":
            spread = scales.repeat_interleave(64, 0)[: SHAPE[0]].repeat_interleave(64, 1)[:, : SHAPE[1]]
        tensors |= {
            f"{name}.weight": weight,
            f"{name}.weight_scale{'_inv' if scaled == 'block' else ''}": scales,
        }
        expected[name] = (weight.float() * spread).bfloat16()
    said: dict[str, Any] = {
        "quant_method": "fp8",
        "weight_block_size": [64, 64] if scaled == "block" else None,
    }
    if scaled == "row":
        said = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    merged(tmp_path, tensors, {"dtype": "bfloat16", "quantization_config": said}, expected)


def every_code(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)


@pytest.mark.parametrize("source", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float_of_eight_bits(tmp_path: Path, source: torch.dtype) -> None:
    codes = every_code(source)
    finite = torch.where(codes.float().isfinite(), codes.view(torch.uint8), 1).view(source)
    tensors = {"a.weight": finite, "a.weight_scale": torch.tensor(1.0)}
    config = {"dtype": "float32", "quantization_config": {"quant_method": "fp8"}}
    merged(tmp_path, tensors, config, {"a": finite.float()})


@pytest.mark.parametrize(
    ("tensors", "said", "message"),
    [
        (
            {"a.W_q": torch.zeros(4, 4, dtype=torch.uint8)},
            {"quant_method": "hqq"},
            "`hqq`, which is not read",
        ),
        (
            {"a.qweight": torch.zeros(4, 4, dtype=torch.int32)},
            {"quant_method": "gptq", "bits": 5},
            "to 5 bits",
        ),
        (
            {"a_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8)},
            {"quant_method": "mxfp4"},
            "lacks `a_scales`",
        ),
        (
            {"a.qweight": torch.zeros(4, 4, dtype=torch.int32)},
            {"quant_method": "awq", "version": "exllama"},
            "version `exllama` of awq",
        ),
        (
            {"a.qweight": torch.zeros(4, 64, dtype=torch.int32)},
            {"quant_method": "awq", "version": "gemv_fast"},
            "`a.qweight` is not of type I16",
        ),
        (
            {"a.qweight": torch.zeros(4, 64, dtype=torch.int16), "a.scales": torch.zeros(1, 16).half()},
            {"quant_method": "awq", "version": "gemv_fast", "group_size": 64},
            "`a.qweight` lacks `a.qzeros`",
        ),
        (
            {"a.qweight": torch.zeros(4, 4, dtype=torch.int32)},
            {"quant_method": "gptq", "bits": 4},
            "`a.qweight` lacks `scales`",
        ),
        (
            {"a.weight": torch.zeros(4, 4, dtype=torch.int8)},
            {"quant_method": "bitsandbytes"},
            "`a.weight` lacks `SCB`",
        ),
        (
            {"a.weight": torch.zeros(8, 1, dtype=torch.uint8)},
            {"quant_method": "bitsandbytes"},
            "`a.weight` of type U8",
        ),
        (
            {"a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)},
            {"quant_method": "fp8"},
            "`a.weight` has no scales",
        ),
        ({"a.weight": torch.zeros(4, 8, dtype=torch.float8_e4m3fn)}, None, "a quantized base?"),
        (
            {"a.weight_packed": torch.zeros(4, 4, dtype=torch.int32)},
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "format `pack-quantized`",
        ),
    ],
)
def test_what_is_not_read_is_named_before_anything_is_written(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    tensors: dict[str, Tensor],
    said: dict[str, Any] | None,
    message: str,
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"quantization_config": said}))
    adapter(tmp_path / "adapter", {"a": (4, 8)})
    assert merge_main([str(base), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]) == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_transformers_saved_in_four_bits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From a quantized model and its adapter in memory to floats on the disk that answer the same."""
    pytest.importorskip("bitsandbytes")
    import transformers

    from tests.model import tiny

    # Not narrower than a block, which bitsandbytes' kernel for the CPU reads as if every row had the first
    # block's scale.
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "original")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantized: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=settings, torch_dtype=torch.float32, device_map="cpu"
    )
    quantized.save_pretrained(tmp_path / "base")
    model = peftrs.get_peft_model(
        quantized, peftrs.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    tiny.shake(model)
    model.save_pretrained(tmp_path / "adapter")
    # Not as for inference, for which bitsandbytes has kernels that round to bfloat16.
    wanted = model.train()(tiny.TOKENS).logits.detach()
    assert merge_main([str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    assert not hasattr(plain.config, "quantization_config")
    assert (tiny.logits(plain) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    # Into the model that was quantized, with what either choice is off by.
    base, original, folder = (str(tmp_path / name) for name in ("base", "original", "adapter"))
    capfd.readouterr()
    options = ["--original", original, "--base", "original"]
    assert merge_main([base, folder, "-o", str(tmp_path / "chosen"), *options]) == 0
    told = re.search(
        r"by ([0-9.]+) % of the change with --base dequantized, by ([0-9.]+) %", capfd.readouterr().err
    )
    assert told is not None
    update, lost = [], []
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            weight = quantized_weight(layer.base_layer)
            update.append(layer.get_delta_weight("default"))
            lost.append(plain_weight(tmp_path / "original", name) - weight)
    share = [sum(float(one.square().sum()) for one in found) for found in (lost, update)]
    assert float(told[2]) == pytest.approx(100 * (share[0] / share[1]) ** 0.5, rel=1e-3)
    assert float(told[1]) < 1e-3
    assert merge_main([original, folder, "-o", str(tmp_path / "plain")]) == 0
    chosen, direct = (load_file(tmp_path / name / "model.safetensors") for name in ("chosen", "plain"))
    assert all(torch.equal(chosen[name], direct[name]) for name in direct)
    for arguments, message in (
        ([base, folder, "--base", "original"], "--base original needs --original"),
        ([original, folder, "--original", original], "BASE is not quantized"),
        ([base, folder, "--base", "other"], "--base is `original` or `dequantized`"),
    ):
        assert merge_main([*arguments, "-o", str(tmp_path / "no")]) == 1
        assert message in capfd.readouterr().err


def quantized_weight(layer: Any) -> Tensor:
    import bitsandbytes

    found: Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found


def plain_weight(folder: Path, name: str) -> Tensor:
    return load_file(folder / "model.safetensors")[f"{name.removeprefix('base_model.model.')}.weight"]
