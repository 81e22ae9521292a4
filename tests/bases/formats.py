"""Linear layers quantized by each library that runs on a CPU, made of the same dense one."""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import nn

WIDTH, OUT = 64, 96
Quantize = Callable[[nn.Linear], nn.Module]


def eight_bit(dense: nn.Linear) -> nn.Module:
    """bitsandbytes' LLM.int8()."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(dense.in_features, dense.out_features, dense.bias is not None, has_fp16_weights=False)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


def four_bit(kind: str, double: bool) -> Quantize:
    """bitsandbytes' 4-bit formats."""

    def quantize(dense: nn.Linear) -> nn.Module:
        import bitsandbytes

        layer = bitsandbytes.nn.Linear4bit(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            torch.float32,
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


def torchao(name: str) -> Quantize:
    """torchao's tensors, by the class of their settings."""

    def quantize(dense: nn.Linear) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao import quantization
        groups = quantization.PerGroup(32)
        settings = {
            "int8": lambda: quantization.Int8WeightOnlyConfig(),
            "int8-groups": lambda: quantization.Int8WeightOnlyConfig(granularity=groups),
            "int8-dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
            "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups),
            "int4-dynamic": lambda: quantization.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4, weight_granularity=groups
            ),
            "float8": lambda: quantization.Float8WeightOnlyConfig(),
        }[name]
        holder = nn.Sequential(copy.deepcopy(dense))
        quantization.quantize_(holder, settings())
        return holder[0]

    return quantize


FORMATS: dict[str, Quantize] = {
    "bnb-int8": eight_bit,
    "bnb-nf4": four_bit("nf4", False),
    "bnb-nf4-double": four_bit("nf4", True),
    "bnb-fp4": four_bit("fp4", False),
    "hqq-4": hqq(4),
    "hqq-8": hqq(8),
    **{f"torchao-{name}": torchao(name) for name in ("int8", "int8-groups", "int8-dynamic", "int4", "int4-dynamic", "float8")},
}

LIBRARY = {"bnb": "bitsandbytes", "hqq": "hqq", "torchao": "torchao"}


def library(name: str) -> str:
    """The library that a format needs."""
    return LIBRARY[name.partition("-")[0]]
