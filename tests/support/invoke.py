"""Commands in this process, whose errors are raised."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner


def run(app: Any, *arguments: str) -> Any:
    """The result of ``app`` with these arguments."""
    return CliRunner().invoke(app, [*arguments], catch_exceptions=False)
