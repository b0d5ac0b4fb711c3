"""Runs with battles, ready to be judged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from arena import fill

from tersor.opening.store import Store


@pytest.fixture(scope="session")
def judged_template(tmp_path_factory: pytest.TempPathFactory, mini_root: Path) -> Path:
    """20 battles of three models on opening-mini."""
    folder = tmp_path_factory.mktemp("template") / "run"
    with Store.open(folder, create=True) as made:
        fill(made, mini_root, ["best", "good", "poor"], count=20)
    return folder


@pytest.fixture
def run(judged_template: Path, tmp_path: Path):
    """A copy of it, to be judged."""
    shutil.copytree(judged_template, tmp_path / "judged")
    with Store.open(tmp_path / "judged") as opened:
        yield opened
