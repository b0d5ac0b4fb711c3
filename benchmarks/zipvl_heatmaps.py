"""Draw what each layer of tiny-vlm keeps of a picture, for the docs.

    python benchmarks/zipvl_heatmaps.py

writes ``docs/assets/zipvl_trail_<tau>.svg``. The pictures come from running the model, not from records.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tersor import _atomic, zoo
from tersor.bench.runs import DEMO_SEED
from tersor.kv.bench.vision import prompt, tasks
from tersor.kv.demos.zipvl import LOWER, TAU, draw_kept
from tersor.kv.zipvl import ZipVL

ASSETS = Path(__file__).resolve().parent.parent / "docs" / "assets"


def main() -> None:
    """One question of three steps, at the default and at a small ``tau``."""
    model, processor = zoo.load_model("tiny-vlm"), zoo.load_processor("tiny-vlm")
    task = tasks(1, seed=DEMO_SEED, kinds=("trail",))[0]
    inputs = prompt(processor, [task])
    for tau in (TAU, LOWER):
        with ZipVL(tau=tau).on(model) as session, torch.no_grad():
            model(**inputs)
            svg = draw_kept(session.stats, inputs, processor, task)
        _atomic.write_text(ASSETS / f"zipvl_trail_{tau:g}.svg", svg)


if __name__ == "__main__":
    main()
