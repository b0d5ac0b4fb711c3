"""What recipes that train a model share: command lines, state and folders to go on from, and memory that is kept."""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def save_state(
    file: Path, *, plan: Any, seed: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Any
) -> None:
    """Write everything that a run needs to go on; the old file stays until the new one is whole."""
    partial = file.with_suffix(".partial")
    torch.save(
        {
            "plan": repr(plan),
            "seed": seed,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "progress": vars(progress),
        },
        partial,
    )
    partial.replace(file)


def load_state(
    file: Path, *, plan: Any, seed: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put model and optimizer where `save_state` left them; returns the fields of its progress, none without a file.

    Raises:
        ValueError: for the file of another plan or seed.
    """
    if not file.exists():
        return {}
    saved = torch.load(file, weights_only=True)
    if saved["plan"] != repr(plan) or saved["seed"] != seed:
        raise ValueError(f"{file} belongs to another plan or seed; remove it or give another --out")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    progress: dict[str, Any] = saved["progress"]
    return progress


def made_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Have ``make`` fill ``folder``, unless an earlier run has; it appears when it is whole."""
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        make(partial)
        partial.replace(folder)


def command_line(what: str, *, threads: int = 2, seeded: bool = True) -> argparse.ArgumentParser:
    """The arguments that all recipes take, to add others to; ``what`` is rebuilt, ``seeded`` if by any seed."""
    parser = argparse.ArgumentParser(description=f"Rebuild {what}.")
    parser.add_argument("--out", type=Path, required=True, help="where state and checkpoint go")
    if seeded:
        parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, for a test of the recipe")
    return parser


def started(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The parsed ``argv``, in a process that is ready to train."""
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_memory()
    return args


def keep_memory() -> None:
    """Have glibc keep freed memory: handing each large tensor back to the system and faulting it in again takes longer
    than computing it. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
