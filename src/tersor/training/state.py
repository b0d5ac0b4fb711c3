"""All that a training run needs to go on where it was stopped: plan, model, optimizer and progress in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor._errors import TersorError


def save_state(
    file: Path, *, plan: Any, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> None:
    """Write the state of a run; the old file stays until the new one is whole.

    Args:
        file: Where to write.
        plan: What the run does, with its seed; told apart by its ``repr``.
        model: Its parameters and buffers are kept.
        optimizer: Its state is kept.
        progress: Counters, losses and tensors such as a generator's state.
    """
    partial = file.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": dict(progress)}
    torch.save({"plan": repr(plan), **state}, partial)
    partial.replace(file)


def load_state(file: Path | None, *, plan: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put model and optimizer where `save_state` left them, and return its progress; empty without a file.

    Args:
        file: What `save_state` wrote; it need not be there.
        plan: As it was given to `save_state`.
        model: Its parameters and buffers are replaced.
        optimizer: Its state is replaced.

    Raises:
        ValueError: If the file belongs to another plan or seed.
    """
    if file is None or not file.is_file():
        return {}
    saved = torch.load(file, weights_only=True)
    if saved["plan"] != repr(plan):
        raise TersorError(
            f"{file} belongs to a run with another plan or seed; repeat its settings, give another --out, or remove it"
        )
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    progress: dict[str, Any] = saved["progress"]
    return progress
