"""The container file: a linter has nothing to say, and the command that it runs knows its options."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from tersor.cli import app

FILE = Path(__file__).resolve().parents[3] / "examples" / "serving" / "Containerfile"
LINTER = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(LINTER is None, reason="hadolint is not installed")
def test_a_linter_has_nothing_to_say() -> None:
    assert LINTER is not None
    done = subprocess.run([LINTER, str(FILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_command_that_it_runs_knows_its_options() -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    command = [json.loads(line.partition(" ")[2]) for line in lines if line.startswith(("ENTRYPOINT", "CMD"))]
    words = [word for part in command for word in part]
    assert words[:3] == ["tersor", "experts", "serve"]
    serve = get_command(app).commands["experts"].commands["serve"]  # type: ignore[attr-defined]
    known = {name for each in serve.params for name in each.opts}
    assert {word for word in words if word.startswith("--")} <= known
