"""Draw the images of docs/zipar.md: by raster, ZipAR and the adaptive window, from the same seed.

    python benchmarks/zipar_samples.py --out benchmarks/results/zipar_samples.json

What is kept are token ids and the pass that decides each row's first token, so that pictures are made from it without
the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from tersor import _atomic, zoo
from tersor.grids.zipar.bench.quality import decodings

MODEL = "tiny-raster"
#: The class that is shown being decoded.
SHOWN = 3


def main(argv: list[str] | None = None) -> int:
    """Draw and write; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw the images of docs/zipar.md.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    model = zoo.load_model(MODEL)
    rows, columns = model.config.grid_size
    drawn = []
    for way in decodings(columns, [9, 4, 1], [4], [], [28]):
        generator = torch.Generator().manual_seed(args.seed)
        shown = way.draw(model, torch.tensor([SHOWN]), generator)
        sheet = way.draw(model, torch.arange(model.config.num_classes), generator)
        kept = {"decided": shown.decided, "ids": shown.ids.tolist(), "sheet": sheet.ids.tolist()}
        drawn.append({"way": way.name, **kept})
    content = {"model": MODEL, "grid": [rows, columns], "seed": args.seed, "drawn": drawn}
    _atomic.write_text(args.out, json.dumps(content) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
