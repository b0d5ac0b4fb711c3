"""Draw what each layer of tiny-vlm keeps of a picture, for the docs.

    python benchmarks/zipvl_heatmaps.py

writes ``docs/assets/zipvl_<question>_<tau>.svg``. The pictures come from running the model, not from records.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tersor import _atomic, zoo
from tersor.bench.runs import DEMO_SEED
from tersor.kv.bench.tiles import KINDS
from tersor.kv.bench.vision import prompt, tasks
from tersor.kv.demos.zipvl import LOWER, TAU, draw_kept
from tersor.kv.zipvl import ZipVL

ASSETS = Path(__file__).resolve().parent.parent / "docs" / "assets"


def main() -> None:
    """One picture for each kind of question, at the default and at a small ``tau``."""
    model, processor = zoo.load_model("tiny-vlm"), zoo.load_processor("tiny-vlm")
    for kind in KINDS:
        task = tasks(1, seed=DEMO_SEED, kinds=(kind,))[0]
        for tau in (TAU, LOWER):
            with ZipVL(tau=tau).on(model) as session, torch.no_grad():
                inputs = prompt(processor, [task])
                model(**inputs)
                svg = draw_kept(session.stats, inputs, processor, task)
            _atomic.write_text(ASSETS / f"zipvl_{kind}_{tau:g}.svg", svg)


if __name__ == "__main__":
    main()
