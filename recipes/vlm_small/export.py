"""Checkpoint folder, lock file and model card of tiny-vlm-small."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from shared.lock import percent, write_lock
from vlm_small.evaluation import score
from vlm_small.train import Trainer

from tersor.bench.runs import markdown

FINAL_SEED = 90210


def export(trainer: Trainer, *, out: Path, samples: int) -> dict[str, Any]:
    """Write the checkpoint folder ``out`` and return the lock: bfloat16 weights, scored as they will be loaded."""
    rounded = trainer.model.to(torch.bfloat16)
    rounded.generation_config.do_sample = False
    rounded.save_pretrained(out)
    trainer.processor.save_pretrained(out)
    grid = trainer.plan.grids[-1]
    scores = score(rounded.float(), trainer.processor, grid=grid, n=samples, seed=FINAL_SEED)
    lock = {
        "recipe": "recipes/tiny_vlm_small.py", "seed": trainer.seed, "steps": trainer.progress.step,
        "minutes": round(trainer.progress.seconds / 60, 1), "plan": asdict(trainer.plan), "grid": grid,
        "parameters": sum(p.numel() for p in rounded.parameters()), "scores": scores,
        "curve": trainer.progress.curve,
    }  # fmt: skip
    return write_lock(out, lock, card)


def card(lock: dict[str, Any]) -> str:
    """The model card as Markdown; every figure comes from the lock."""
    cells = lock["grid"] ** 2
    return "\n".join(
        [
            "# tiny-vlm-small",
            "",
            f"A `Qwen2_5_VLForConditionalGeneration` with {lock['parameters']:,} parameters that answers two kinds of "
            f"questions about a picture of {lock['grid']} x {lock['grid']} cells of 8 x 8 pixels, {cells} visual "
            "tokens: `color K` asks for the lower colour of the only tile whose upper colour is K, `count K` for the "
            "number of such tiles. A few cells are tiles, the rest is grey noise, so most visual tokens are "
            "redundant and it is known which are not. It knows nothing else.",
            "",
            "Weights are stored in bfloat16. The processor reads pictures with PIL; sides should be multiples of 8 "
            "pixels. An answer is one word and `<eos>`; another question may follow.",
            "",
            "## Scores on pictures that it never saw",
            "",
            *markdown(
                ("question", "right, % [95 % Wilson]", "questions"),
                ((kind, percent(each), f"{each['n']:,}") for kind, each in lock["scores"].items()),
            ),
            "",
            "## Training",
            "",
            f"`python recipes/tiny_vlm_small.py --out OUT`, seed {lock['seed']}, {lock['steps']:,} steps in "
            f"{lock['minutes']:.0f} minutes on {lock['machine']['cores']} cores ({lock['machine']['cpu']}). Pictures "
            f"are generated, 1 to 6 tiles each, with {lock['plan']['turns']} questions in a row; the grid grows when "
            "look-ups are solved.",
            "",
            *markdown(
                ("step", "minutes", "grid", "loss", "color", "count"),
                (
                    (
                        row["step"],
                        row["minutes"],
                        row["grid"],
                        f"{row['loss']:.4f}",
                        f"{row['color']:.2f}",
                        f"{row['count']:.2f}",
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
