"""Checkpoint folder, lock file and model card of tiny-vlm."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from shared.lock import percent, write_lock
from vlm.evaluation import mask_test, score
from vlm.grounding import EARLY, READING
from vlm.train import Trainer

from tersor.bench.runs import markdown
from tersor.kv.bench.tiles import KINDS, STEPS

FINAL_SEED = 90210


def export(trainer: Trainer, *, out: Path, samples: int) -> dict[str, Any]:
    """Write the checkpoint folder ``out`` and return the lock: bfloat16 weights, scored as they will be loaded."""
    trainer.model.set_attn_implementation("sdpa")
    rounded = trainer.model.to(torch.bfloat16)
    rounded.generation_config.do_sample = False
    rounded.save_pretrained(out)
    trainer.processor.save_pretrained(out)
    last = trainer.plan.stages[-1]
    model = rounded.float().eval()
    lock = {
        "recipe": "recipes/tiny_vlm.py", "seed": trainer.seed, "steps": trainer.progress.step,
        "minutes": round(trainer.progress.seconds / 60, 1), "plan": asdict(trainer.plan),
        "grid": last.grid, "fillers": last.fillers[1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "scores": score(
            model, trainer.processor, grid=last.grid, fillers=last.fillers[1], n=samples, seed=FINAL_SEED
        ),
        "reads": mask_test(model, trainer.processor, pictures=max(1, min(16, samples // 8))),
        "curve": trainer.progress.curve,
    }  # fmt: skip
    return write_lock(out, lock, card)


def card(lock: dict[str, Any]) -> str:
    """The model card as Markdown; every figure comes from the lock."""
    plan, cells = lock["plan"], lock["grid"] ** 2
    early, reading = (", ".join(map(str, layers)) for layers in (EARLY, READING))
    met = (
        "In half of the later steps some of the question's meaningless words are left out of those early layers as "
        "ZipVL leaves out tokens, so that it has met zero attention outputs."
        if plan["left_out"]
        else "No token was ever left out of a layer while it was trained."
    )
    turns = f" In {plan['turns']:.0%} of those steps the questions are turns of one dialogue." if plan["turns"] else ""
    some = (
        f" Only {plan['taught']:.0%} of the meaningless words are told so, and what to answer; the others are free."
        if plan["taught"] < 1
        else ""
    )
    stages = len(plan["stages"])
    return "\n".join(
        [
            "# tiny-vlm",
            "",
            f"A `Qwen2_5_VLForConditionalGeneration` with {lock['parameters']:,} parameters that follows tiles in a "
            f"picture of {lock['grid']} x {lock['grid']} cells of 8 x 8 pixels, {cells:,} visual tokens. A tile's "
            "upper half is its key, its lower half its value, and every value is another tile's key. "
            + " ".join(f"`{kind} K` follows {steps} tile{'s'[: steps > 1]}." for kind, steps in STEPS.items())
            + f" Between the colour and the question mark stand up to {lock['fillers']} words without a meaning. It "
            "is known which cells matter, and for which step. The vision tower has no blocks: a visual token knows its "
            "own cell only. It knows nothing else.",
            "",
            "**What training imposes.** Where the model reads the picture is taught, not found: from each word of a "
            f"question, one head is told to attend to the cell of step 1, 2 and 3 in layers {reading}, and in layers "
            f"{early} two heads to attend to the question's own colour and kind.{some} {met} The finished model is a "
            "plain one with causal attention in all layers. Do not take it for how real models read.",
            "",
            "Weights are stored in bfloat16. The processor reads pictures with PIL; sides should be multiples of 8 "
            f"pixels. An answer is one word and `<eos>`{'; another question may follow' if plan['turns'] else ''}.",
            "",
            "## Scores on pictures that it never saw",
            "",
            *markdown(
                ("question", "right, % [95 % Wilson]", "questions"),
                ((kind, percent(each), f"{each['n']:,}") for kind, each in lock["scores"].items()),
            ),
            "",
            "## Where it reads",
            "",
            "Right answers, %, when the picture is hidden from the question in some layers; chance is 12.5.",
            "",
            *markdown(
                ("the question sees the picture", *KINDS),
                (
                    (view, *(f"{100 * shares[kind]['share']:.0f}" for kind in KINDS))
                    for view, shares in lock["reads"].items()
                ),
            ),
            "",
            "## Training",
            "",
            f"`python recipes/tiny_vlm.py --out OUT`, seed {lock['seed']}, {lock['steps']:,} steps in "
            f"{lock['minutes']:.0f} minutes on {lock['machine']['cores']} cores ({lock['machine']['cpu']}). Pictures "
            f"are generated, in {stages} stages from {plan['stages'][0]['grid']} x {plan['stages'][0]['grid']} cells "
            "on; several questions are asked about each; a stage ends when they are solved. While a picture is small "
            f"the question never sees it in layers {early}, later in half of the steps.{turns} Below: right answers "
            "while training, mean of the last steps.",
            "",
            *markdown(
                ("step", "seconds", "grid", "loss", *KINDS),
                (
                    (
                        row["step"],
                        f"{row['seconds']:.0f}",
                        row["grid"],
                        f"{row['loss']:.4f}",
                        *(f"{row[kind]:.2f}" if kind in row else "" for kind in KINDS),
                    )
                    for row in lock["curve"]
                ),
                names=0,
            ),
            "",
            "Generated data; Apache-2.0.",
            "",
        ]
    )
