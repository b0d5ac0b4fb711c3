"""Rebuild tiny-lm: books -> training -> recall on a held-out book -> checkpoint, lock file and card.

    python recipes/tiny_lm.py --out OUT [--data BOOKS]

takes about 40 minutes on two CPU cores and resumes where it was when started again. Without --data the books are
fetched from their public home and compared with the checksums that the shipped checkpoint was trained with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tiny_lm_data import fetch_books, read_books
from tiny_lm_eval import bits_per_byte, recall_by_task
from tiny_lm_export import SAMPLES, export, write_text
from tiny_lm_train import Phase, Plan, Trainer

PLAN = Plan(
    phases=(
        Phase(length=200, size=16, rows=4, steps=500, dense=0.8),
        Phase(length=520, size=8, rows=2, steps=550, dense=0.6),
        Phase(length=1056, size=6, rows=1, steps=200, dense=0.4, noise=0.3),
        Phase(length=1056, size=6, rows=1, steps=500, dense=0.4, noise=0.6),
        Phase(length=1056, size=6, rows=1, steps=300, dense=0.4, noise=1.5, rate=0.25),
    )
)
SMOKE = Plan(
    phases=(
        Phase(length=200, size=4, rows=1, steps=6, dense=1.0),
        Phase(length=264, size=2, rows=1, steps=4, dense=0.5, noise=0.6),
    )
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of the recipe."""
    parser = argparse.ArgumentParser(description="Rebuild tiny-lm.")
    parser.add_argument("--data", type=Path, help="folder of *.txt books; fetched from their public home when absent")
    parser.add_argument("--out", type=Path, required=True, help="where state, checkpoint and text go")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, for a test of the recipe")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train, score and export; returns the exit code."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    try:
        books = read_books(args.data if args.data is not None else fetch_books(args.out / "books"))
        args.out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(
            books,
            SMOKE if args.smoke else PLAN,
            args.seed,
            args.out / "state.pt",
            threads=args.threads,
            compile_model=not args.smoke,
        )
    except (ValueError, OSError) as error:
        print(f"tiny_lm: {error}", file=sys.stderr)
        return 2
    questions = 4 if args.smoke else 24

    def look(trainer: Trainer, loss: float) -> None:
        length = trainer.plan.phase_at(trainer.progress.step - 1).length
        context = max(192, length - length % 64)
        recall = recall_by_task(
            trainer.model, books.validation, n=questions, seed=1000 + trainer.progress.step, context_bytes=context
        )
        bits = bits_per_byte(trainer.model, books.validation, length=min(length, 1024), rows=16)
        row = {
            "step": trainer.progress.step,
            "minutes": round(trainer.progress.seconds / 60, 1),
            "loss": round(loss, 4),
            "context": context,
            "bits_per_byte": round(bits, 3),
            **{task: round(share, 3) for task, share in recall.items()},
        }
        trainer.progress.curve.append(row)
        print(row, flush=True)

    trainer.run(look=look, look_every=5 if args.smoke else 100)
    lock = export(
        trainer.model,
        books,
        trainer.plan,
        trainer.progress,
        seed=args.seed,
        out=args.out / "tiny-lm",
        samples=8 if args.smoke else SAMPLES,
    )
    write_text(books, args.out / "texts")
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
