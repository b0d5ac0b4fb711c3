"""Optional dependencies: the one place that says which extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType


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
        missing = error.name or module
        raise MissingExtraError(
            f"{missing} is missing: this needs tersor[{extra}]: pip install 'tersor[{extra}]'",
            name=error.name,
        ) from error
