"""Rebuild tiny-experts: a base on a mixture of skills, four full fine-tunings of it, and a router.

    python recipes/tiny_experts.py --out OUT

takes about half an hour on one CPU core. All data is generated; nothing is fetched. A run resumes where it was when
started again.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from experts.export import EXPERTS, card, character_tokenizer, scores
from experts.train import Fit, Size, as_record, fit, new_classifier, new_model, plant
from shared.lock import share_of, write_lock
from shared.run import Progress, command_line, parse_and_prepare, refused
from transformers.utils import logging

from tersor import _atomic
from tersor.experts.bench.requests import DESCRIPTIONS, draw_requests
from tersor.experts.bench.routing import training_requests
from tersor.experts.bench.skills import MIXTURE, PAD, SKILLS, examples, rows_of
from tersor.experts.calibration import Batches
from tersor.experts.router import Router, RouterConfig
from tersor.experts.router.evaluation import evaluate
from tersor.experts.router.training import Request, RouterTraining, train_router

NAME = "tiny-experts"
#: Requests that the router is scored on, and what draws them.
REQUESTS, REQUEST_SEED = 1000, 41
PLANT_SEED = 6


@dataclass(frozen=True)
class Plan:
    """Sizes and trainings of all parts.

    Args:
        planted: Channels of every linear whose activations are made ``factor`` times as large.
        requests: Requests that the router is trained on.
    """

    size: Size
    base: Fit
    experts: dict[str, Fit]
    planted: int
    factor: float
    router_size: Size
    router: RouterTraining
    requests: int


FULL = Plan(
    size=Size(hidden=96, layers=3, heads=4, ffn=256),
    base=Fit(MIXTURE, steps=1600, rate=3e-3),
    experts={
        "reverse": Fit(("reverse",), steps=800, rate=1e-3),
        "sort": Fit(("sort",), steps=800, rate=1e-3),
        "add": Fit(("add",), steps=1400, rate=1e-3),
        "shift": Fit(("shift",), steps=800, rate=1e-3),
    },
    planted=2,
    factor=16.0,
    router_size=Size(hidden=64, layers=2, heads=4, ffn=192),
    router=RouterTraining(steps=1200, batch=32, rate=2e-3),
    requests=8000,
)
SMOKE = Plan(
    size=Size(hidden=32, layers=1, heads=2, ffn=48),
    base=Fit(MIXTURE, steps=4, rate=3e-3, batch=10, warmup=2, pool=64),
    experts={skill: Fit((skill,), steps=2, rate=1e-3, batch=8, warmup=1, pool=64) for skill in SKILLS},
    planted=2,
    factor=16.0,
    router_size=Size(hidden=32, layers=1, heads=2, ffn=48),
    router=RouterTraining(steps=2, batch=4, rate=1e-3),
    requests=64,
)


def rounded(model: Any) -> Any:
    """``model`` in float32 with the numbers that its bfloat16 file holds."""
    return model.to(torch.bfloat16).float()


def make_base(plan: Plan, seed: int, out: Path) -> tuple[Any, dict[str, list[int]], Progress]:
    """The planted base as it is stored, and the planted channels by linear."""
    model = new_model(plan.size, seed)
    progress = fit(model, plan.base, seed=seed, state=out / "base.pt")
    planted = plant(model, prompts(plan.base), channels=plan.planted, factor=plan.factor, seed=seed)
    return rounded(model), planted, progress


def prompts(fitted: Fit) -> Batches:
    """Some of what the base was trained on."""
    rows = [rows_of(examples(skill, 128, seed=PLANT_SEED, held_out=False))[0] for skill in fitted.skills]
    return [(ids, (ids != PAD).long()) for ids in rows]


def make_router(plan: Plan, seed: int, out: Path) -> Router:
    """The trained router."""
    config = RouterConfig(kind="encoder", experts=DESCRIPTIONS, max_tokens=plan.router_size.positions)
    return train_router(
        config, new_classifier(plan.router_size, seed, len(DESCRIPTIONS)), character_tokenizer(),
        training_requests(plan.requests), plan.router, state=out / "router.pt",
        on_progress=lambda doing: print(f"router, {doing}", flush=True),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Train, score and export; returns the exit code."""
    args = parse_and_prepare(command_line(NAME, threads=1), argv)
    logging.disable_progress_bar()
    plan, folder = SMOKE if args.smoke else FULL, args.out / NAME
    tokenizer = character_tokenizer()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        base, planted, progress = make_base(plan, args.seed, args.out)
        trainings = {"base": as_record(plan.base, progress)}
        experts: dict[str, Any] = {}
        for skill, each in plan.experts.items():
            model = copy.deepcopy(base)
            progress = fit(model, each, seed=args.seed, state=args.out / f"{skill}.pt")
            trainings[skill] = as_record(each, progress)
            experts[skill] = rounded(model)
        router = make_router(plan, args.seed, args.out)
    except (ValueError, OSError) as error:
        return refused("tiny_experts", error)
    for where, model in {".": base, **{f"{EXPERTS}/{skill}": model for skill, model in experts.items()}}.items():
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder / where)
        tokenizer.save_pretrained(folder / where)
    router.scorer.model.to(torch.bfloat16)
    router.save_pretrained(folder / "router")
    _atomic.write_text(folder / "planted.json", json.dumps(planted) + "\n")
    facts = {
        "recipe": "recipes/tiny_experts.py", "seed": args.seed,
        "size": asdict(plan.size), "parameters": sum(p.numel() for p in base.parameters()),
        "planted": {"channels": plan.planted, "factor": plan.factor}, "trainings": trainings,
        "scores": scores(base, experts),
        "router": {
            **asdict(plan.router), "requests": plan.requests, "size": asdict(plan.router_size), "n": REQUESTS,
            **router_scores(Router.from_pretrained(folder / "router")),
        },
    }  # fmt: skip
    lock = write_lock(folder, facts, card)
    print(lock["scores"], lock["router"], flush=True)
    return 0


def router_scores(router: Router) -> dict[str, dict[str, float]]:
    """Shares of held-out requests that reach their expert, with templates of the training and with others."""
    found = {}
    for name, unseen in (("seen", False), ("unseen", True)):
        rows = draw_requests(REQUESTS, seed=REQUEST_SEED, unseen=unseen, held_out=True)
        confusion = evaluate(router, [Request(row.text, row.skill) for row in rows]).confusion
        found[name] = share_of(sum(row[place] for place, row in enumerate(confusion)), REQUESTS)
    return found


if __name__ == "__main__":
    sys.exit(main())
