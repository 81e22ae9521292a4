"""`peft.import_utils`: which optional libraries are there, asked by `is_<library>_available` and
`is_<library>_ge_v<version>`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

PACKAGES = {
    "aqlm": "aqlm",
    "bnb": "bitsandbytes",
    "bnb_4bit": "bitsandbytes",
    "diffusers": "diffusers",
    "eetq": "eetq",
    "gptqmodel": "gptqmodel",
    "hqq": "hqq",
    "inc": "neural_compressor",
    "optimum": "optimum",
    "te": "transformer_engine",
    "te_pytorch": "transformer_engine",
    "torchao": "torchao",
    "transformers": "transformers",
}
"""The package that each short name stands for."""

QUESTION = re.compile(r"is_(?P<name>\w+?)_(?:available|(?P<order>ge|le)_v?(?P<version>\d+(?:_\d+)*))")


def __getattr__(name: str) -> Callable[..., bool]:
    asked = QUESTION.fullmatch(name)
    if name in DEVICES:
        return DEVICES[name]
    if asked is None or asked["name"] not in PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package, order, bound = (
        PACKAGES[asked["name"]],
        asked["order"],
        _numbers((asked["version"] or "0").replace("_", ".")),
    )

    def answer(*_: object) -> bool:
        if importlib.util.find_spec(package) is None:
            return False
        if order is None:
            return True
        try:
            held = _numbers(version(package))
        except PackageNotFoundError:
            return False
        # "Up to 4.53" takes 4.53.2 in.
        return held >= bound if order == "ge" else held[: len(bound)] <= bound

    answer.__name__ = name
    return answer


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _xpu(check_device: bool = False) -> bool:
    import torch

    return torch.xpu.is_available()


def _tpu(check_device: bool = True) -> bool:
    if importlib.util.find_spec("torch_xla") is None:
        return False
    if check_device:
        import torch_xla.core.xla_model  # type: ignore[import-not-found, unused-ignore]

        try:
            torch_xla.core.xla_model.xla_device()
        except RuntimeError:
            return False
    return True


DEVICES: dict[str, Callable[..., bool]] = {"is_torch_tpu_available": _tpu, "is_xpu_available": _xpu}
