"""Runs with battles, ready to be judged."""

from __future__ import annotations

import pytest
from arena import fill

from tersor.opening.store import Store


@pytest.fixture
def run(store, mini_root) -> Store:
    """20 battles of three models on opening-mini."""
    fill(store, mini_root, ["best", "good", "poor"], count=20)
    return store
