"""Stand-ins for layers of libraries that need a GPU or another accelerator: the interface that `peftrs.bases`
reads, and no more.

Each says where the real class is published and which of its names it stands for. `python -m
tests.bases.standins` downloads those packages, reads the classes from their sources' syntax trees, and writes
`interfaces.json`, to which a test holds the stand-ins.
"""

import ast
import json
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RECORD = Path(__file__).with_name("interfaces.json")
WIDTH, OUT = 32, 48


@dataclass(frozen=True)
class Published:
    """Where a class is published, and which of its attributes, its parents' among them, a base reads."""

    package: str
    """Its name on the index, or the address of a source archive."""
    file: str
    kind: str
    names: tuple[str, ...]
    parents: tuple[tuple[str, str], ...] = ()
    """Further files and classes that it inherits from."""
    forward: str = "forward"
    """The method that is called with the layer's input."""


GPTQMODEL = "gptqmodel/nn_modules/qlinear"
ROOT = ((f"{GPTQMODEL}/__init__.py", "BaseQuantLinear"),)
GPTQ = (
    *ROOT,
    (f"{GPTQMODEL}/__init__.py", "GPTQQuantLinear"),
    (f"{GPTQMODEL}/__init__.py", "GroupedQuantLinear"),
)
AWQ = (
    *ROOT,
    (f"{GPTQMODEL}/__init__.py", "AWQuantLinear"),
    (f"{GPTQMODEL}/__init__.py", "GroupedQuantLinear"),
)
QUANT_LINEAR = (
    "bits",
    "in_features",
    "out_features",
    "bias",
    "qweight",
    "scales",
    "SUPPORTS_TRAINING",
    "SUPPORTS_METHODS",
)
INC = "neural_compressor/torch/algorithms/fp8_quant/_quant_common/helper_modules.py"
TE = "transformer_engine/pytorch/module"
EETQ = (  # on no index
    "https://github.com/NetEase-FuXi/EETQ/archive/156e42507a459d8f028e68ec232acc0feb7428f8.tar.gz"
)

PUBLISHED = {
    "gptq": Published("gptqmodel", f"{GPTQMODEL}/marlin.py", "MarlinLinear", QUANT_LINEAR, GPTQ),
    "gptq-torch": Published("gptqmodel", f"{GPTQMODEL}/torch.py", "TorchLinear", QUANT_LINEAR, GPTQ),
    "awq": Published("gptqmodel", f"{GPTQMODEL}/marlin_awq.py", "AwqMarlinLinear", QUANT_LINEAR, AWQ),
    "autoawq": Published(
        "autoawq", "awq/modules/linear/gemm.py", "WQLinear_GEMM",
        ("w_bit", "in_features", "out_features", "bias", "qweight", "qzeros", "scales"),
    ),
    "aqlm": Published(
        "aqlm", "aqlm/inference.py", "QuantizedLinear",
        ("in_features", "out_features", "codes", "codebooks", "scales", "bias", "num_codebooks",
        "nbits_per_codebook"),
    ),
    "inc": Published(
        "neural_compressor", INC, "PatchedLinear",
        ("weight", "scale_weight", "matmul_fp8", "dequant_weights", "qdq_weights", "use_qdq", "fake_quant",
        "hp_dtype"),
        ((INC, "PatchedLinearBase"), ("neural_compressor/torch/algorithms/fp8_quant/patched_module_base.py",
        "PatchedModuleBase")),
        "forward_quant",
    ),
    "te": Published(
        "transformer_engine", f"{TE}/linear.py", "Linear",
        ("in_features", "out_features", "use_bias", "weight_names", "bias_names"),
    ),
    "te-norm": Published(
        "transformer_engine", f"{TE}/layernorm_linear.py", "LayerNormLinear", ("in_features", "out_features"),
    ),
    "te-mlp": Published("transformer_engine", f"{TE}/layernorm_mlp.py", "LayerNormMLP", ("fc2_weight",)),
    "eetq": Published(
        EETQ, "python/eetq/modules/qlinear.py", "EETQLinear", ("in_features", "out_features", "weight",
        "weight_scales", "bias"),
    ),
}  # fmt: skip


def attributes(source: str, kind: str) -> set[str]:
    """The attributes of a class: what its body assigns and defines, and what its methods set on `self`, read
    or register.
    """
    found: set[str] = set()
    for node in ast.walk(
        next(one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.ClassDef) and one.name == kind)
    ):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Call(func=ast.Attribute(attr=call), args=[ast.Constant(value=str(name)), *_]) if (
                call.startswith("register_")
            ):
                found.add(name)
    return found


def needed(source: str, kind: str, method: str) -> list[str] | None:
    """The arguments of a method, after `self`, that have no default; None if the class defines no such
    method.
    """
    there = next(
        one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.ClassDef) and one.name == kind
    )
    for node in there.body:
        if isinstance(node, ast.FunctionDef) and node.name == method:
            given = [one.arg for one in (*node.args.posonlyargs, *node.args.args)][1:]
            lone = [
                one.arg
                for one, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                if value is None
            ]
            return given[: len(given) - len(node.args.defaults)] + lone
    return None


class _Coded(nn.Module):
    """Codes of 4 bits, a scale a column: the weight is `(codes - 8) * scales`, `(in, out)`."""

    dense: Tensor

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = WIDTH, OUT
        self.register_buffer(self.stored, torch.randint(0, 16, (WIDTH, OUT), dtype=torch.int32))
        self.register_buffer(self.scaled, torch.rand(OUT) * 0.01)
        self.register_buffer("bias", torch.randn(OUT) if bias else None)

    stored, scaled = "qweight", "scales"

    def true(self) -> Tensor:
        """The weight, `(out, in)`."""
        return ((getattr(self, self.stored) - 8) * getattr(self, self.scaled)).mT

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(
            x, self.true().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )


class BaseQuantLinear(_Coded):
    """A kernel of gptqmodel that does not train."""

    SUPPORTS_TRAINING = False
    SUPPORTS_METHODS = ("gptq",)
    bits = 4

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class TorchLinear(BaseQuantLinear):
    """A kernel of gptqmodel that trains."""

    SUPPORTS_TRAINING = True
    forward = _Coded.forward


class AwqLinear(BaseQuantLinear):
    """A kernel of gptqmodel for AWQ."""

    SUPPORTS_METHODS = ("awq",)


class WQLinear_GEMM(_Coded):  # noqa: N801 (AutoAWQ's name)
    """AutoAWQ's layer."""

    w_bit = 4
    forward = torch.no_grad()(_Coded.forward)


class QuantizedLinear(_Coded):
    """AQLM's layer, one code for a pair of inputs aside."""

    stored = "codes"
    num_codebooks, nbits_per_codebook = 1, 16


class EETQLinear(_Coded):
    """EETQ's layer: the kernel takes float16 and knows no graph."""

    stored, scaled = "weight", "weight_scales"

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype is torch.float16
        return super().forward(x.float()).half()


class PatchedLinear(nn.Module):
    """Neural Compressor's layer after conversion: FP8 weights `(in, out)`, and inputs that are rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.hp_dtype = torch.float32
        self.weight = nn.Parameter(
            torch.randn(OUT, WIDTH).to(torch.float8_e4m3fn).t().contiguous(), requires_grad=False
        )
        self.bias = nn.Parameter(torch.randn(OUT), requires_grad=False)
        self.scale_weight = torch.tensor(0.05)
        self.matmul_fp8 = torch.matmul

    def true(self) -> Tensor:
        return (self.weight.float() * self.scale_weight).mT

    def forward(self, x: Tensor) -> Tensor:
        rounded = x.detach().to(torch.float8_e4m3fn).float()
        return self.matmul_fp8(rounded, self.weight.float()) * self.scale_weight + self.bias


class Linear(nn.Module):
    """Transformer Engine's layer, its weight in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features, self.use_bias = WIDTH, OUT, True
        self.weight_names, self.bias_names = ["query_weight", "key_weight"], ["query_bias", "key_bias"]
        for name in self.weight_names:
            self.register_parameter(name, nn.Parameter(torch.randn(OUT // 2, WIDTH)))
        for name in self.bias_names:
            self.register_parameter(name, nn.Parameter(torch.randn(OUT // 2)))

    def true(self) -> Tensor:
        return torch.cat([self.query_weight, self.key_weight])

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.true(), torch.cat([self.query_bias, self.key_bias]))


class LayerNormLinear(nn.Module):
    """Transformer Engine's norm and linear layer in one."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = WIDTH, OUT
        self.weight = nn.Parameter(torch.randn(OUT, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.layer_norm(x, (WIDTH,)), self.weight)


class LayerNormMLP(nn.Module):
    """Transformer Engine's norm and feedforward layers in one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1_weight = nn.Parameter(torch.randn(OUT, WIDTH))
        self.fc2_weight = nn.Parameter(torch.randn(WIDTH, OUT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.layer_norm(x, (WIDTH,)) @ self.fc1_weight.mT) @ self.fc2_weight.mT


STANDINS: dict[str, type[nn.Module]] = {
    "gptq": BaseQuantLinear, "gptq-torch": TorchLinear, "awq": AwqLinear, "autoawq": WQLinear_GEMM,
    "aqlm": QuantizedLinear,
    "eetq": EETQLinear, "inc": PatchedLinear, "te": Linear, "te-norm": LayerNormLinear,
    "te-mlp": LayerNormMLP,
}  # fmt: skip

MODULES = {
    "gptq": "gptqmodel", "gptq-torch": "gptqmodel", "awq": "gptqmodel", "autoawq": "awq", "aqlm": "aqlm",
    "eetq": "eetq",
    "inc": "neural_compressor", "te": "transformer_engine", "te-norm": "transformer_engine",
    "te-mlp": "transformer_engine",
}  # fmt: skip


def place() -> None:
    """Makes the stand-ins say that they come from the libraries."""
    for name, kind in STANDINS.items():
        for parent in kind.__mro__:
            if parent.__module__ == __name__ or parent.__module__.endswith(".stand_in"):
                parent.__module__ = f"{MODULES[name]}.stand_in"


def published(package: str, folder: Path) -> tuple[str, dict[str, str]]:
    """A package's version, and its Python sources by path from the package's root."""
    if "://" in package:
        urllib.request.urlretrieve(package, folder / package.rpartition("/")[2])
    else:
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(folder),
            package,
        ]
        subprocess.run(download, check=True)
    archive = next(folder.iterdir())
    sources: dict[str, str] = {}
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            sources = {name: opened.read(name).decode() for name in opened.namelist() if name.endswith(".py")}
    else:
        with tarfile.open(archive) as opened:
            members = [one for one in opened.getmembers() if one.name.endswith(".py")]
            sources = {one.name.partition("/")[2]: opened.extractfile(one).read().decode() for one in members}
    return archive.name, sources


def main() -> None:
    """Reads the published classes and records those of their names that the stand-ins stand for."""
    found: dict[str, Any] = {}
    packages: dict[str, tuple[str, dict[str, str]]] = {}
    for name, where in PUBLISHED.items():
        if where.package not in packages:
            with tempfile.TemporaryDirectory() as folder:
                packages[where.package] = published(where.package, Path(folder))
        archive, sources = packages[where.package]
        files = ((where.file, where.kind), *where.parents)
        there = set().union(*(attributes(sources[file], kind) for file, kind in files))
        found[name] = {
            "archive": archive,
            "class": f"{where.file}: {where.kind}",
            "names": sorted(there & set(where.names)),
            "missing": sorted(set(where.names) - there),
            "called with": next(
                names
                for file, kind in files
                if (names := needed(sources[file], kind, where.forward)) is not None
            ),
        }
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
