"""Runs of opening-mini."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor.opening.mini import write_mini
from tersor.opening.store import Store


@pytest.fixture(scope="session")
def mini_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """opening-mini on the disk; tests that change it copy it."""
    root = tmp_path_factory.mktemp("mini")
    write_mini(root)
    return root


@pytest.fixture
def store(tmp_path: Path):
    """An empty run."""
    with Store.open(tmp_path / "run", create=True) as opened:
        yield opened
