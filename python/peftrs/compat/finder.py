"""The import machinery of the alias: one finder for modules and for the distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from os import PathLike
from types import ModuleType
from typing import Any

from peftrs.compat.names import HOMES, LAYERS, METHODS, MODULES, NAMES
from peftrs.compat.parts import part
from peftrs.config import FORMAT_VERSION

METADATA = {
    "METADATA": (
        f"Metadata-Version: 2.1\nName: peft\nVersion: {FORMAT_VERSION}\nSummary: peftrs under the name of"
        " PEFT\n"
    ),
    "top_level.txt": "peft\n",
}


class Finder(DistributionFinder):
    """Answers for `peft` and its modules as far as the tables of names go."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module of the alias, or None for any other module."""
        if name not in MODULES:
            return None
        parent = any(other.startswith(f"{name}.") for other in MODULES)
        return ModuleSpec(name, self, is_package=parent, origin="peftrs")  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty module that looks names up in the tables when they are asked for."""
        return Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the module answers by the tables."""

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[Distribution]:
        """The distribution `peft`, of the version whose files and names are followed."""
        return [AliasDistribution()] if (context.name or "peft").lower() == "peft" else []


class Alias(ModuleType):
    """A module of PEFT's name whose attributes are ours."""

    __peftrs__ = True

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return sorted(one for one in NAMES if not one.startswith("_"))
        if f"{self.__name__}.{name}" in MODULES:
            return import_module(f"{self.__name__}.{name}")
        found = self._found(name)
        if found is None:
            raise AttributeError(f"peftrs has nothing for `{self.__name__}.{name}`")
        setattr(self, name, found)
        return found

    def _found(self, name: str) -> Any:
        """What a name means in this module, or None."""
        if (
            self.__name__ in HOMES
            and (found := getattr(import_module(HOMES[self.__name__]), name, None)) is not None
        ):
            return found
        folder = self.__name__.removeprefix("peft.tuners.").partition(".")[0]
        if folder in METHODS and (found := import_module(LAYERS).layer_class(folder, name)) is not None:
            return found
        if name in NAMES:
            module, _, attribute = NAMES[name].partition(":")
            return getattr(import_module(module), attribute) if attribute else import_module(module)
        if name == "LoraLayer":
            return import_module(LAYERS).layer_class("lora", name)
        # What asks for libraries is imported into many of PEFT's modules.
        return (
            getattr(import_module(HOMES["peft.import_utils"]), name, None)
            if name.startswith("is_")
            else part(name)
        )

    def __dir__(self) -> list[str]:
        return sorted(NAMES)


def under(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__` that gives the names of one of PEFT's modules, but for modules in it."""
    alias = Alias(module)

    def find(name: str) -> Any:
        if f"{module}.{name}" in MODULES:
            raise AttributeError(
                f"peftrs has no module of its own for `{module}.{name}`; hint: peftrs.compat.install()"
            )
        return getattr(alias, name)

    return find


class AliasDistribution(Distribution):
    """Metadata that says which version of PEFT the alias stands for."""

    def read_text(self, filename: str) -> str | None:
        """The text of a metadata file."""
        return METADATA.get(filename)

    def locate_file(self, path: str | PathLike[str]) -> Any:
        """No file belongs to the alias."""
        raise FileNotFoundError(path)
