"""What recipes that train a model share: command lines, a run that goes on after a kill, and memory that is kept."""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from tersor.training.state import load_state, save_state

#: Seconds between two states on disk.
SAVE_EVERY_S = 60.0

T = TypeVar("T")


@dataclass
class Progress:
    """What a run knows about its past; part of the state file."""

    step: int = 0
    seconds: float = 0.0
    """Time spent in steps."""
    curve: list[Any] = field(default_factory=list)
    """A row of scores now and then."""


P = TypeVar("P", bound=Progress)


class Run(Generic[P]):
    """Model, optimizer and progress of a plan, which go on where an earlier run of the same plan and seed was stopped.

    Args:
        state: File to keep them in.
        plan: What the run does.
        seed: What is drawn.
        model: To train.
        optimizer: Of the model's parameters.
        progress: An empty one, of the class that the recipe needs.

    Raises:
        ValueError: If the file belongs to another plan or seed.
    """

    def __init__(
        self, state: Path, plan: Any, seed: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: P
    ) -> None:
        self.state, self.plan, self.model, self.optimizer = state, (plan, seed), model, optimizer
        kept = load_state(state, plan=self.plan, model=model, optimizer=optimizer)
        self.progress: P = type(progress)(**kept) if kept else progress
        self.saved = time.monotonic()

    def advance(self, step: Callable[[], T]) -> T:
        """Take one step and count it, with its time."""
        started = time.monotonic()
        result = step()
        self.progress.step += 1
        self.progress.seconds += time.monotonic() - started
        return result

    def note(self, row: Any) -> None:
        """Add a row to the curve and print it."""
        self.progress.curve.append(row)
        print(row, flush=True)

    def save(self, *, now: bool) -> None:
        """Write the state, ``now`` or if the last time is long ago."""
        if now or time.monotonic() - self.saved > SAVE_EVERY_S:
            save_state(
                self.state, plan=self.plan, model=self.model, optimizer=self.optimizer, progress=vars(self.progress)
            )
            self.saved = time.monotonic()


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of all of an optimizer's parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def command_line(what: str, *, threads: int = 2, seeded: bool = True) -> argparse.ArgumentParser:
    """The arguments that all recipes take, to add others to.

    Args:
        what: What is rebuilt.
        threads: Default of ``--threads``.
        seeded: Whether the recipe takes any seed.
    """
    parser = argparse.ArgumentParser(description=f"Rebuild {what}.")
    parser.add_argument("--out", type=Path, required=True, help="where state and checkpoint go")
    if seeded:
        parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, for a test of the recipe")
    return parser


def parse_and_prepare(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The parsed ``argv``, in a process that is ready to train."""
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_memory()
    return args


def refused(name: str, error: Exception) -> int:
    """Print why a recipe cannot start; returns its exit code."""
    print(f"{name}: {error}", file=sys.stderr)
    return 2


def keep_memory() -> None:
    """Have glibc keep freed memory: handing each large tensor back to the system and faulting it in again takes longer
    than computing it. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
