"""Shared fixtures. The environment is set first, because libraries read it when they are imported."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Where there is no GPU, the Triton kernels run in its interpreter; Triton reads this when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # two workers share the cores; more threads only make them wait for each other

# Machines differ in speed, and a slow example is not a wrong one.
hypothesis.settings.register_profile("tersor", deadline=None, print_blob=True)
hypothesis.settings.load_profile("tersor")


def pytest_report_header() -> str:
    """What repeats this run's draw of models, see end_to_end/test_sweep.py."""
    return f"SWEEP_SEED={os.environ.get('SWEEP_SEED', date.today().toordinal())}"


_POISONED_FOLDERS = {"lowbit", "kv"}


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill memory from `torch.empty` and its relatives with NaN (integers: the largest value).

    Code that reads what it never wrote then fails every time, and not only when the memory was dirty.
    """

    def poisoned(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = original(*args, **kwargs)
            with torch.no_grad():
                return tensor if tensor.is_meta else _poison(tensor)

        return allocate

    with torch.device("cpu"):
        torch.empty(
            0
        )  # the first use notes for good which functions of torch follow a device; it must see the real ones
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def _poison_where_memory_is_managed(request: pytest.FixtureRequest) -> None:
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    if folder in _POISONED_FOLDERS:
        request.getfixturevalue("poison_empty")
