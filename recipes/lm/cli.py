"""What the recipes of tiny-lm and tiny-lm-tied share: their command line, and a row of the training curve."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeVar

from lm.data import fetch_books, read_books
from lm.evaluation import bits_per_byte, recall_by_task
from lm.train import Plan, Trainer
from shared.run import command_line, parse_and_prepare

T = TypeVar("T", bound=Trainer)


def arguments(name: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of the recipe of ``name``."""
    parser = command_line(name)
    parser.add_argument("--data", type=Path, help="folder of *.txt books; fetched from their public home when absent")
    return parse_and_prepare(parser, argv)


def trainer_of(args: argparse.Namespace, kind: type[T], plan: Plan) -> T:
    """A trainer on the books that the command line names; raises `ValueError` or `OSError`."""
    books = read_books(args.data if args.data is not None else fetch_books(args.out / "books"))
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.out / "state.pt"
    return kind(books, plan, args.seed, state, threads=args.threads, compile_model=not args.smoke)


def note_progress(trainer: Trainer, loss: float, *, questions: int, context: int, length: int) -> None:
    """Score the model on the validation books, add a row to its curve and print it.

    Args:
        trainer: Its model is scored.
        loss: Of the steps since the last row.
        questions: Of each task.
        context: Bytes of a recall question.
        length: Bytes of a window of prose.
    """
    progress, books = trainer.progress, trainer.books
    recall = recall_by_task(
        trainer.model, books.validation, n=questions, seed=1000 + progress.step, context_bytes=context
    )
    row: dict[str, Any] = {
        "step": progress.step,
        "minutes": round(progress.seconds / 60, 1),
        "loss": round(loss, 4),
        "context": context,
        "bits_per_byte": round(bits_per_byte(trainer.model, books.validation, length=length, rows=16), 3),
        **{task: round(share, 3) for task, share in recall.items()},
    }
    trainer.kept.note(row)
