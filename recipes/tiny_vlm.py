"""Rebuild tiny-vlm: a Qwen2.5-VL of 0.4 million parameters that follows tiles in a picture of 1,024 visual tokens.

    python recipes/tiny_vlm.py --out OUT

The data is generated; nothing is fetched. Takes about five minutes on two CPU cores and resumes where it was when
started again. ``--without-left-out`` trains the variant whose early layers never met a token that was left out.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from shared.run import command_line, parse_and_prepare, refused
from vlm.export import export
from vlm.train import SMOKE, Plan, Trainer


def main(argv: list[str] | None = None) -> int:
    """Train, score and export; returns the exit code."""
    parser = command_line("tiny-vlm")
    parser.add_argument("--without-left-out", action="store_true", help="never leave out words while training")
    args = parse_and_prepare(parser, argv)
    plan = replace(SMOKE if args.smoke else Plan(), left_out=not args.without_left_out)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(plan, args.seed, args.out / "state.pt")
    except (ValueError, OSError) as error:
        return refused("tiny_vlm", error)
    trainer.run()
    lock = export(trainer, out=args.out / "tiny-vlm", samples=8 if args.smoke else 1000)
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
