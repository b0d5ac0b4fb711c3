"""Rebuild tiny-lm: books -> training -> recall on a held-out book -> checkpoint, lock file and card.

    python recipes/tiny_lm.py --out OUT [--data BOOKS]

takes about 40 minutes on two CPU cores and resumes where it was when started again. Without --data the books are
fetched from their public home and compared with the checksums that the shipped checkpoint was trained with.
"""

from __future__ import annotations

import sys

from lm.cli import arguments, note_progress, trainer_of
from lm.export import SAMPLES, export, write_text
from lm.train import Phase, Plan, Trainer
from shared.run import refused

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


def main(argv: list[str] | None = None) -> int:
    """Train, score and export; returns the exit code."""
    args = arguments("tiny-lm", argv)
    try:
        trainer = trainer_of(args, Trainer, SMOKE if args.smoke else PLAN)
    except (ValueError, OSError) as error:
        return refused("tiny_lm", error)

    def look(trainer: Trainer, loss: float) -> None:
        length = trainer.plan.phase_at(trainer.progress.step - 1).length
        questions, context = 4 if args.smoke else 24, max(192, length - length % 64)
        note_progress(trainer, loss, questions=questions, context=context, length=min(length, 1024))

    trainer.run(look=look, look_every=5 if args.smoke else 100)
    lock = export(
        trainer.model,
        trainer.books,
        trainer.plan,
        trainer.progress,
        seed=args.seed,
        out=args.out / "tiny-lm",
        samples=8 if args.smoke else SAMPLES,
    )
    write_text(trainer.books, args.out / "texts")
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
