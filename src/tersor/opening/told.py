"""What the commands of `tersor opening` share: the run, and how each says what came of it and what comes next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Run = Annotated[Path, typer.Argument(help="Folder of the run.", metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def tell(as_json: bool, facts: dict[str, Any], said: str, follows: str) -> None:
    """What came of a command, and the command that comes next."""
    if as_json:
        typer.echo(json.dumps(facts | {"next": f"tersor opening {follows}"}))
        return
    typer.echo(said)
    typer.echo(f"next: tersor opening {follows}")
