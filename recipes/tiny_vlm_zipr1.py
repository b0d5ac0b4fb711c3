"""Rebuild tiny-vlm-zipr1: tiny-vlm after a ZipR1 training, which answers as before from fewer tokens.

    python recipes/tiny_vlm_zipr1.py --out OUT

The data is generated; nothing is fetched. Needs the extra rl, takes about half an hour on two CPU cores and resumes
where it was when started again.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared.lock import Lock, percent, share_of, write_lock
from shared.run import command_line, parse_and_prepare, refused
from transformers import PreTrainedModel

from tersor import zoo
from tersor.bench.runs import markdown
from tersor.kv.bench.tiles import samples
from tersor.rl.bench.arms import Plan, as_questions
from tersor.rl.bench.outcome import Outcome, ask
from tersor.rl.policy import load_policy
from tersor.rl.run import run_zipr1
from tersor.rl.verifiers import exact_match

NAME, START = "tiny-vlm-zipr1", "tiny-vlm"
PLAN = Plan(steps=100, grid=32)
SMOKE = Plan(steps=2, questions=1, thresholds=(0.5, 0.975), grid=8, pictures=6)
#: Seed of the questions that both models are asked at the end; the training's report has a few of its own.
FINAL_SEED, REPORT_SEED = 90210, 5


def main(argv: list[str] | None = None) -> int:
    """Train, score and export; returns the exit code."""
    args = parse_and_prepare(command_line(NAME), argv)
    plan = SMOKE if args.smoke else PLAN
    saving = {"save_strategy": "steps", "save_steps": 1 if args.smoke else 10, "save_total_limit": 1}
    config = plan.config(args.out / "run", args.seed, (), **saving)
    processor = zoo.load_processor(START)
    try:
        run_zipr1(
            load_policy(str(zoo.path(START))), processor, plan.data(args.seed),
            as_questions(1 if args.smoke else 10, seed=REPORT_SEED, grid=plan.grid), exact_match, config,
            facts={"model": START}, evaluation_batch=15,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        return refused("tiny_vlm_zipr1", error)
    trained = load_policy(str(args.out / "run" / "model"))
    lock = export(trained, processor, plan, args.seed, out=args.out / NAME, n=2 if args.smoke else 223)
    print({name: row["right"] for name, row in lock["scores"].items()}, flush=True)
    return 0


def export(trained: PreTrainedModel, processor: Any, plan: Plan, seed: int, *, out: Path, n: int) -> Lock:
    """Write the checkpoint folder ``out`` and return the lock: bfloat16 weights, scored as they will be loaded."""
    rounded = trained.to(torch.bfloat16)
    rounded.generation_config.do_sample = False
    rounded.save_pretrained(out)
    processor.save_pretrained(out)
    lock = {
        "recipe": "recipes/tiny_vlm_zipr1.py", "seed": seed, "plan": asdict(plan),
        "parameters": sum(p.numel() for p in rounded.parameters()),
        "scores": scores({START: zoo.load_model(START), NAME: rounded.float().eval()}, processor, plan, n),
    }  # fmt: skip
    return write_lock(out, lock, card)


def scores(models: dict[str, PreTrainedModel], processor: Any, plan: Plan, n: int) -> dict[str, Any]:
    """Both models on the same ``n`` questions of each kind: by ZipVL, densely, and from as many random tokens."""
    asked = samples(n, seed=FINAL_SEED, grid=plan.grid)
    found = {}
    for name, model in models.items():
        sparse = ask(model, processor, asked, plan.eval_threshold)
        found[name] = _row(sparse)
        found[f"{name}, random tokens"] = _row(
            ask(model, processor, asked, plan.eval_threshold, random=sparse.visual_ratios(), seed=FINAL_SEED)
        )
        found[f"{name}, dense"] = _row(ask(model, processor, asked, 1.0))
    return found


def _row(outcome: Outcome) -> dict[str, Any]:
    right = share_of(int(sum(outcome.right)), len(outcome.right))
    if not outcome.ratios:
        return {"right": right}
    layers = [round(total / len(outcome.right), 4) for total in outcome.layers]
    shares = {"ratio": outcome.ratio, "relevant": float(np.mean(outcome.relevant))}
    return {"right": right, "layers": layers, **{name: round(value, 4) for name, value in shares.items()}}


def card(lock: Lock) -> str:
    """The model card as Markdown; every figure comes from the lock."""
    plan, found = lock["plan"], lock["scores"]
    before, after = found[START], found[NAME]
    tau = f"{plan['eval_threshold']:g}"
    thresholds = ", ".join(f"{each:g}" for each in plan["thresholds"])
    return "\n".join(
        [
            f"# {NAME}",
            "",
            f"`{START}` after ZipR1 (arXiv 2504.18579): at ZipVL's threshold {tau} its attention needs "
            f"{after['ratio']:.1%} of the prompt's tokens, where {before['ratio']:.1%} were needed before. "
            f"What is said of `{START}`, what its training imposes above all, is true of this model, too.",
            "",
            "```python",
            f"with tersor.ZipVL(tau={tau}).on(model):",
            "    out = model.generate(**inputs)",
            "```",
            "",
            f"Weights are stored in bfloat16; {lock['parameters']:,} parameters. It is meant for ZipVL.",
            "",
            f"## Scores on questions that it never saw, {plan['grid']} x {plan['grid']} cells",
            "",
            *markdown(
                ("model", "right, % [95 % Wilson]", "tokens in attention, %", "of the visual ones kept, matter, %"),
                (
                    (
                        name,
                        percent(row["right"]),
                        f"{100 * row['ratio']:.1f}" if "ratio" in row else "100",
                        f"{100 * row['relevant']:.2f}" if "relevant" in row else "",
                    )
                    for name, row in found.items()
                ),
            ),
            "",
            f"{before['right']['n']:,} questions, the same for each row. Random tokens are visual ones, as many in "
            "each layer as the model's own choice keeps.",
            "",
            "Tokens in attention by layer, %:",
            "",
            *markdown(
                ("model", *(str(layer) for layer in range(len(before["layers"])))),
                ((name, *(f"{100 * share:.0f}" for share in found[name]["layers"])) for name in (START, NAME)),
            ),
            "",
            "## Training",
            "",
            f"`python recipes/tiny_vlm_zipr1.py --out OUT`, seed {lock['seed']}: {plan['steps']} updates of "
            f"{plan['questions']} questions at the thresholds {thresholds}; pathwise objective, weight of saved tokens "
            f"{plan['efficiency_weight']:g}, beta {plan['beta']:g}, learning rate {plan['learning_rate']:g} falling to "
            f"0; {plan['pictures']} generated pictures. On {lock['machine']['cores']} cores "
            f"({lock['machine']['cpu']}).",
            "",
            "Generated data; Apache-2.0.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
