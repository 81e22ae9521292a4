"""Linear layers quantized by each library that runs on a CPU, made of the same dense one."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

WIDTH, OUT = 64, 96
Quantize = Callable[[nn.Linear], nn.Module]


def eight_bit(dense: nn.Linear) -> nn.Module:
    """bitsandbytes' LLM.int8()."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(
        dense.in_features, dense.out_features, dense.bias is not None, has_fp16_weights=False
    )
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


def four_bit(kind: str, double: bool, dtype: torch.dtype = torch.float32) -> Quantize:
    """bitsandbytes' 4-bit formats."""

    def quantize(dense: nn.Linear) -> nn.Module:
        import bitsandbytes

        layer = bitsandbytes.nn.Linear4bit(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            dtype,
            compress_statistics=double,
            quant_type=kind,
        )
        layer.load_state_dict(dense.state_dict())
        return layer.to("cpu")

    return quantize


def hqq(bits: int, dtype: torch.dtype = torch.float32) -> Quantize:
    """HQQ."""

    def quantize(dense: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        settings = BaseQuantizeConfig(nbits=bits, group_size=32)
        return HQQLinear(copy.deepcopy(dense), settings, compute_dtype=dtype, device="cpu")

    return quantize


def torchao_settings(name: str) -> Any:
    """What torchao is told to quantize by."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization
    groups = quantization.PerGroup(32)
    return {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int8-groups": lambda: quantization.Int8WeightOnlyConfig(granularity=groups),
        "int8-dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups),
        "int4-dynamic": lambda: quantization.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=groups
        ),
        "float8": lambda: quantization.Float8WeightOnlyConfig(),
    }[name]()


def torchao(name: str) -> Quantize:
    """torchao's tensors, by the class of their settings."""

    def quantize(dense: nn.Linear) -> nn.Module:
        settings = torchao_settings(name)
        from torchao.quantization import quantize_

        holder = nn.Sequential(copy.deepcopy(dense))
        quantize_(holder, settings)
        return holder[0]

    return quantize


def packed(kind: Any, dense: nn.Linear, **options: Any) -> nn.Module:
    """A layer of gptqmodel with this one's weight on a grid of 4 bits a group."""
    settings = {
        "bits": 4,
        "group_size": GROUP,
        "sym": False,
        "desc_act": False,
        "in_features": dense.in_features,
        "out_features": dense.out_features,
    }
    layer = kind(**settings, bias=dense.bias is not None, pack_dtype=torch.int32, **options)
    groups = dense.weight.detach().reshape(dense.out_features, dense.in_features // GROUP, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    scales = (high - low) / 15
    zeros = torch.round(-low / scales)
    layer.pack(dense, scales, zeros, torch.arange(dense.in_features, dtype=torch.int32) // GROUP)
    layer.post_init()
    return layer


def gptq(dense: nn.Linear) -> nn.Module:
    """gptqmodel's kernel in plain torch."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    # Compiling the dequantization takes longer than all else here.
    TorchLinear.optimize = lambda *_, **__: None
    return packed(TorchLinear, dense)


def awq(dense: nn.Linear) -> nn.Module:
    """gptqmodel's kernel for AWQ in plain torch."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    return packed(AwqTorchLinear, dense)


def aqlm(dense: nn.Linear) -> nn.Module:
    """AQLM with random codes."""
    from aqlm import QuantizedLinear

    layer = QuantizedLinear(
        dense.in_features, dense.out_features, 8, 1, 1, 16, dense.bias is not None, dtype=torch.float32
    )
    with torch.no_grad():
        layer.codes.copy_(torch.randint(-(2**15), 2**15, layer.codes.shape))
        layer.codebooks.normal_(std=0.1)
        layer.scales.fill_(1)
        if dense.bias is not None:
            layer.bias.copy_(dense.bias)
    return layer


GROUP = 32

ELSEWHERE: dict[str, tuple[str, Quantize]] = {
    "gptq": ("gptqmodel", gptq),
    "awq": ("gptqmodel", awq),
    "aqlm": ("aqlm", aqlm),
}
"""Formats whose libraries are not among the tests' own, each with the library's name."""

FORMATS: dict[str, Quantize] = {
    "bnb-int8": eight_bit,
    "bnb-nf4": four_bit("nf4", False),
    "bnb-nf4-double": four_bit("nf4", True),
    "bnb-fp4": four_bit("fp4", False),
    "hqq-4": hqq(4),
    "hqq-8": hqq(8),
    **{
        f"torchao-{name}": torchao(name)
        for name in ("int8", "int8-groups", "int8-dynamic", "int4", "int4-dynamic", "float8")
    },
}

LIBRARY = {"bnb": "bitsandbytes", "hqq": "hqq", "torchao": "torchao"}


def library(name: str) -> str:
    """The library that a format needs."""
    return LIBRARY[name.partition("-")[0]]
