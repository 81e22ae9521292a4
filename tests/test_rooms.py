"""The direction of imports between the rooms of the package, and their size, read from the sources' syntax
trees.
"""

import ast
import re
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
    {"planning"},
    {"io"},
    {"methods"},
    {"core"},
    {"bases"},
    {"ops"},
    {"config"},
    {"registry", "hub"},
    {"errors", "dtype", "torch_private"},
    {"_native"},
]
HEIGHT = {room: -place for place, rooms in enumerate(ORDER) for room in rooms}

OPTIONAL = {
    "accelerate", "aqlm", "bitsandbytes", "diffusers", "eetq", "gptqmodel", "hqq", "huggingface_hub",
    "neural_compressor",
    "torchao", "transformer_engine", "transformers",
}  # fmt: skip
OPTIONAL_IN = ("model", "compat", "planning", "convert", "train", "hub", "io/card", "core/prompt", "bases")

CONFIG = re.compile(r"(\w+_)?configs?\d*")
"""What code calls configs."""
NO_ADAPTERS = {
    ("bases/gptq.py", "bias"): "a layer's",
    ("core/inject.py", "bias"): "a layer's",
    ("planning/outline.py", "architectures"): "of a model's config",
}
"""What may be asked for by name, since it is nothing of an adapter's config."""


def room(path: Path) -> str:
    """The room that a file of the package belongs to."""
    return path.parts[0].removesuffix(".py")


def imports(node: ast.AST, *, in_function: bool = False) -> Iterator[tuple[str, ast.stmt, bool]]:
    """Every dotted name imported beneath `node`, its statement, and whether a function defers it.

    What only type checkers read is included.
    """
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import():
                yield from ((alias.name, child, in_function) for alias in child.names)
            case ast.ImportFrom(module=None) | ast.ImportFrom(level=1 | 2 | 3):
                yield "." * child.level, child, in_function
            case ast.ImportFrom(module=str(module)):
                yield from ((f"{module}.{alias.name}", child, in_function) for alias in child.names)
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
        ("core/slots.py", "import typing\nif typing.TYPE_CHECKING:\n    from peftrs.model import PeftModel"),
        ("core/layer.py", "import transformers"),
        ("core/layer.py", "def f():\n    import transformers"),
        ("io/state.py", "from ..core import layer"),
        ("model/peft_model.py", "from transformers import PreTrainedModel"),
        ("model/peft_model.py", "import peft"),
        ("convert/weighted.py", "from peftrs.model.peft_model import PeftModel"),
        ("planning/attach.py", "def f():\n    from peftrs.convert import changes"),
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
        ("model/peft_model.py", "def f():\n    import transformers"),
        ("methods/dora.py", "from peftrs.methods.lora import Lora, scale\nclass Dora(Lora): ..."),
    ],
)
def test_an_import_along_the_order_passes(path: str, source: str) -> None:
    assert not faults(Path(path), ast.parse(source))


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """The groups of modules each of which imports itself by way of all others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = arrows.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    reach = {module: reached(module) for module in arrows}
    found: list[set[str]] = []
    for module, seen in reach.items():
        if module in seen and not any(module in circle for circle in found):
            found.append({other for other in seen if module in reach[other]})
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [{"b", "c"}]


def test_imports_make_no_circles_in_the_core_and_few_small_ones_elsewhere() -> None:
    """Imports for type checkers alone and those that a function defers included."""
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    arrows = {}
    for module, path in names.items():
        found = [
            name.removeprefix("peftrs.") for name, _, _ in imports(ast.parse((PACKAGE / path).read_text()))
        ]
        homes = {name if name in names else name.rpartition(".")[0] for name in found}
        arrows[module] = {home for home in homes if home in names and home != module}
    found = circles(arrows)
    assert not [circle for circle in found if any(module.startswith("core.") for module in circle)]
    assert len(found) <= 2
    assert all(len(circle) <= 3 for circle in found)


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


def settings() -> set[str]:
    """The fields of all adapter configs, and what `Absent` says of configs without them."""
    classes = [
        node
        for path in SOURCES
        for node in ast.walk(ast.parse((PACKAGE / path).read_text()))
        if isinstance(node, ast.ClassDef) and (node.name.endswith("Config") or node.name == "Absent")
    ]
    return {
        line.target.id
        for each in classes
        for line in each.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def is_config(node: ast.AST) -> bool:
    """Whether an expression is called a config, or is one of several, whatever type it is cast to."""
    match node:
        case ast.Call(func=ast.Name("cast"), args=[_, inner]) | ast.Subscript(value=inner):
            return is_config(inner)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return CONFIG.fullmatch(name) is not None
    return False


def probes(tree: ast.AST, fields: set[str]) -> Iterator[tuple[ast.expr, str]]:
    """Where code asks whether a config has a field, and the field, "" for one that only a run would tell.

    That is: one of `fields` asked of anything by a name in quotes, and anything asked of what is called a
    config. To read a field whose name is a variable asks nothing, as it fails where there is none.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name("getattr" | "hasattr"), args=[_, ast.Constant(str(field)), *_]) if (
                field in fields
            ):
                yield node, field
            case (
                ast.Call(func=ast.Name("hasattr"), args=[asked, field, *_])
                | ast.Call(func=ast.Name("getattr"), args=[asked, field, _])
            ) if is_config(asked):
                yield node, field.value if isinstance(field, ast.Constant) else ""
            case (
                ast.Call(func=ast.Name("vars"), args=[asked]) | ast.Attribute(value=asked, attr="__dict__")
            ) if is_config(asked):
                yield node, ""


def test_no_code_asks_whether_a_config_has_a_field() -> None:
    fields = settings()
    assert {"bias", "feedforward_modules", "target_parameters", "token_indices"} <= fields
    found = {
        (path.as_posix(), field): f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path in SOURCES
        for node, field in probes(ast.parse((PACKAGE / path).read_text()), fields)
    }
    assert [text for key, text in found.items() if key not in NO_ADAPTERS] == []
    assert NO_ADAPTERS.keys() <= found.keys(), "an exception that nothing needs"


@pytest.mark.parametrize(
    "source",
    [
        "getattr(config, 'bias', 'none')",
        "getattr(other, 'bias', 'none')",
        "getattr(configs[name], field, None)",
        "getattr(model.peft_config[name], 'unheard_of', None)",
        "getattr(cast(Any, config), field, None)",
        "hasattr(config0, field)",
        "hasattr(fitted.config, 'unheard_of')",
        "vars(config).get(field)",
        "config.__dict__.get(field)",
    ],
)
def test_a_question_to_a_config_is_found(source: str) -> None:
    assert list(probes(ast.parse(source), {"bias"}))


@pytest.mark.parametrize(
    "source",
    [
        "config.bias",
        "getattr(config, field)",
        "getattr(model, 'config', None)",
        "getattr(model, 'peft_config', {})",
        "getattr(getattr(model, 'config', None), 'vocab_size', None)",
        "hasattr(module, 'weight')",
        "vars(torch)",
        "module.__dict__",
    ],
)
def test_a_question_to_anything_else_passes(source: str) -> None:
    assert not list(probes(ast.parse(source), {"bias"}))
