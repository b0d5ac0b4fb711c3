"""Rebuild tiny-vlm-small: a Qwen2.5-VL of half a million parameters that answers questions about tiles in a picture.

    python recipes/tiny_vlm_small.py --out OUT

The data is generated; nothing is fetched. Takes about half an hour on two CPU cores and resumes where it was when
started again.
"""

from __future__ import annotations

import sys

from shared.run import command_line, parse_and_prepare, refused
from vlm_small.export import export
from vlm_small.train import SMOKE, Plan, Trainer


def main(argv: list[str] | None = None) -> int:
    """Train, score and export; returns the exit code."""
    args = parse_and_prepare(command_line("tiny-vlm-small"), argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(SMOKE if args.smoke else Plan(), args.seed, args.out / "state.pt")
    except (ValueError, OSError) as error:
        return refused("tiny_vlm_small", error)
    trainer.run(look_every=3 if args.smoke else 100, questions=4 if args.smoke else 128)
    lock = export(trainer, out=args.out / "tiny-vlm-small", samples=8 if args.smoke else 1000)
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
