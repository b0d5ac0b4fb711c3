"""Rebuild tiny-judge: a Qwen2-VL of a million parameters, and the adapter that makes it a judge of small pictures.

    python recipes/tiny_judge.py --out OUT

The data is generated; nothing is fetched. Needs the extras arena and rl, takes about a quarter of an hour on two CPU
cores and resumes where it was when started again.
"""

from __future__ import annotations

import sys

from judge.base import SMOKE, Plan, Trainer
from judge.export import NAME, JudgePlan, export, export_base, train_judge
from judge.export import SMOKE as SMOKE_JUDGE
from shared.run import command_line, parse_and_prepare, refused


def main(argv: list[str] | None = None) -> int:
    """Train, score and export; returns the exit code."""
    args = parse_and_prepare(command_line(NAME), argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        base = Trainer(SMOKE if args.smoke else Plan(), args.seed, args.out / "state.pt")
    except (ValueError, OSError) as error:
        return refused("tiny_judge", error)
    base.run(look_every=1 if args.smoke else 50)
    folder, plan = args.out / NAME, SMOKE_JUDGE if args.smoke else JudgePlan()
    export_base(base, folder)
    told = train_judge(folder, plan, args.seed, args.out / "judge", save_every=1 if args.smoke else 25)
    lock = export(base, told, plan, args.out / "judge" / "run", folder)
    print(lock["after"]["agreement"]["fdt"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
