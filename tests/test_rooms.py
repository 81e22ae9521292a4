"""The direction of imports between the rooms of the package, and their size, read from the sources' syntax
trees.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGE = CHECKOUT / "python" / "peftrs"
SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
LONGEST = 480

# A room imports itself and what stands below it.
ORDER = [
    {"functional", "helpers", "utils", "cli"},
    {"compat"},
    {"optimizers"},
    {"train"},
    {"model"},
    {"convert"},
    {"plan"},
    {"io"},
    {"methods"},
    {"core"},
    {"bases"},
    {"ops"},
    {"config"},
    {"registry", "hub"},
    {"errors", "torch_private"},
    {"_native"},
]
HEIGHT = {room: -place for place, rooms in enumerate(ORDER) for room in rooms}

OPTIONAL = {
    "accelerate", "aqlm", "bitsandbytes", "diffusers", "eetq", "gptqmodel", "hqq", "huggingface_hub",
    "neural_compressor",
    "torchao", "transformer_engine", "transformers",
}  # fmt: skip
OPTIONAL_IN = ("model", "compat", "plan", "convert", "train", "hub", "io/card", "core/prompt", "bases")


def room(path: Path) -> str:
    """The room that a file of the package belongs to."""
    return path.parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    """Whether `node` is a block that only type checkers read, which imports nothing."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports(node: ast.AST, *, in_function: bool = False) -> Iterator[tuple[str, ast.stmt, bool]]:
    """Every dotted name imported beneath `node` at run time, its statement, and whether a function defers
    it.
    """
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import():
                yield from ((alias.name, child, in_function) for alias in child.names)
            case ast.ImportFrom(module=None) | ast.ImportFrom(level=1 | 2 | 3):
                yield "." * child.level, child, in_function
            case ast.ImportFrom(module=str(module)):
                yield from ((f"{module}.{alias.name}", child, in_function) for alias in child.names)
            case _ if is_type_checking(child):
                continue
            case _:
                deferred = in_function or isinstance(
                    child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
                )
                yield from imports(child, in_function=deferred)


def parents(tree: ast.AST) -> set[str]:
    """The modules that a file imports its classes' parents from."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bases = {ast.unparse(base) for each in classes for base in each.bases}
    names = [name.rpartition(".") for name, _, _ in imports(tree)]
    return {module for module, _, last in names if last in bases}


def _is_sibling(path: Path, name: str, declared: set[str]) -> bool:
    """Whether a method imports from another one's file or folder, and not what its classes are made of."""
    own = len(path.parts) > 2 and name.startswith(f"peftrs.methods.{path.parts[1]}")
    return not own and name.rpartition(".")[0] not in declared


def faults(path: Path, tree: ast.AST) -> list[str]:
    """What the imports of one file break of the package's order."""
    found = []
    here = room(path)
    declared = parents(tree)
    for name, statement, deferred in imports(tree):
        top, _, rest = name.partition(".")
        where = f"{path}:{statement.lineno}: imports {name}"
        if not top:
            found.append(f"{where}: relative imports hide the room")
        elif top == "peft":
            found.append(f"{where}: peftrs replaces it")
        elif top in OPTIONAL:
            if not deferred:
                found.append(f"{where} when it is itself imported")
            if not str(path).removesuffix(".py").startswith(OPTIONAL_IN):
                found.append(f"{where}: optional libraries belong to {', '.join(OPTIONAL_IN)}")
        elif top == "peftrs":
            other = rest.partition(".")[0]
            if other not in HEIGHT and here == "compat":
                continue  # the alias stands on the public names
            if other not in HEIGHT:
                found.append(f"{where}: no room of this name stands below another")
            elif other != here and HEIGHT[other] >= HEIGHT[here]:
                found.append(f"{where}: {here} stands below {other} or beside it")
            elif here == other == "methods" and _is_sibling(path, name, declared):
                found.append(f"{where}: a method imports no sibling but a parent of its classes")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_run_one_way(path: Path) -> None:
    if path.name != "__init__.py" or len(path.parts) > 1:
        assert room(path) in HEIGHT, f"{path} belongs to no room"
        assert not faults(path, ast.parse((PACKAGE / path).read_text(), str(path)))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/layer.py", "from peftrs.methods.lora import Lora"),
        ("core/layer.py", "from peftrs import model"),
        ("core/layer.py", "def f():\n    from peftrs.io.state import collect"),
        ("core/layer.py", "import transformers"),
        ("core/layer.py", "def f():\n    import transformers"),
        ("io/state.py", "from ..core import layer"),
        ("model/peft_model.py", "from transformers import PreTrainedModel"),
        ("model/peft_model.py", "import peft"),
        ("convert/weighted.py", "from peftrs.model.peft_model import PeftModel"),
        ("plan/attach.py", "def f():\n    from peftrs.convert import changes"),
        ("ops/low_rank.py", "from peftrs.bases.dense import Dense"),
        ("methods/oft.py", "from peftrs.methods.lora import scale"),
        ("methods/oft.py", "from peftrs import LoraConfig"),
    ],
)
def test_an_import_against_the_order_is_found(path: str, source: str) -> None:
    assert faults(Path(path), ast.parse(source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "core/layer.py",
            "from peftrs.bases.base import Base\nfrom peftrs.core.method import Method\nimport torch",
        ),
        ("core/slots.py", "import typing\nif typing.TYPE_CHECKING:\n    from peftrs.model import PeftModel"),
        ("model/peft_model.py", "def f():\n    import transformers"),
        ("methods/dora.py", "from peftrs.methods.lora import Lora, scale\nclass Dora(Lora): ..."),
    ],
)
def test_an_import_along_the_order_passes(path: str, source: str) -> None:
    assert not faults(Path(path), ast.parse(source))


def test_the_core_names_no_method() -> None:
    methods = {path.stem for path in (PACKAGE / "methods").glob("*.py")} - {"__init__"}
    assert methods
    named = [
        f"core/{path.name}:{node.lineno}: {node.value!r}"
        for path in (PACKAGE / "core").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.lower() in methods
    ]
    assert not named


def test_no_source_is_too_long_to_have_one_subject() -> None:
    sources = [
        *PACKAGE.rglob("*.py"),
        *(CHECKOUT / "rust").glob("*/src/**/*.rs"),
        *(CHECKOUT / "tests").rglob("*.py"),
    ]
    assert len(sources) > 20
    lengths = {str(path.relative_to(CHECKOUT)): len(path.read_text().splitlines()) for path in sources}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}
