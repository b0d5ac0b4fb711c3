"""What is imported on first use: a package's public names, and optional dependencies with the extra to install."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from types import ModuleType
from typing import Any


class MissingExtraError(ImportError):
    """A feature needs packages that the base installation leaves out; the message is the command to run."""


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which the extra ``extra`` brings, and return it.

    Raises `MissingExtraError` with one line if it, or something it needs, is not installed. A package that is
    installed but broken raises its own error, because installing the extra again would not mend it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(advice(error.name or module, extra), name=error.name) from error


def installed(module: str) -> bool:
    """Whether ``module`` can be found; it is not imported, only the packages that it lies in."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def advice(module: str, extra: str) -> str:
    """One line that says what is missing, and the command that brings all of ``extra``, wherever tersor came from."""
    own = re.compile(rf";\s*extra == ['\"]{extra}['\"]\s*$")
    try:
        stated = metadata.requires("tersor") or []
    except metadata.PackageNotFoundError:  # source files on the path, nothing installed
        stated = []
    wanted = [own.sub("", each) for each in stated if own.search(each)] or [module.partition(".")[0]]
    return f"{module} is missing (extra {extra}): pip install {shlex.join(wanted)}"


#: Name of a package -> what it offers although a room above it defines it; the root package fills this in.
HANDED_ON: dict[str, dict[str, str]] = {}


def members(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package that hands on names of other modules.

    Args:
        package: Name of the package.
        homes: Public name -> the module that defines it, imported when the name is first asked for.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it offers {', '.join(sorted(homes))}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return find, names
