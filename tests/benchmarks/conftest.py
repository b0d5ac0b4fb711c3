"""What all tests of scripts need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """The scripts set the number of threads for themselves."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
