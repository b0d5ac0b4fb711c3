"""What commands show while they work."""

from __future__ import annotations

from typing import Any


def spinner() -> Any:
    """A spinner on standard error, so that standard output stays clean."""
    from rich.console import Console

    return Console(stderr=True).status("starting")
