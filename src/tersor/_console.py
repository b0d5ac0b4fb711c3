"""What commands show while they work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def spinner() -> Any:
    """A spinner on standard error, so that standard output stays clean."""
    from rich.console import Console

    return Console(stderr=True).status("starting")


def prefixed(on_progress: Callable[[str], None], name: str) -> Callable[[str], None]:
    """``on_progress`` of one part, with the part's name before what is being done."""
    return lambda doing: on_progress(f"{name}: {doing}")
