"""Draw the pictures of docs/nar.md: images, clips and captions, by NAR and by what it is compared with.

    python benchmarks/nar_samples.py --out benchmarks/results/nar_samples.json

What is kept are token ids, so that pictures are made from it without the models.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tersor import _atomic, zoo
from tersor.grids.nar.bench.quality import Decoding, decodings
from tersor.grids.nar.captions import caption
from tersor.grids.nar.demo import CLIPS, IMAGES, SETTINGS, TEXT

#: The class that is shown being decoded; classes of clips; and captions as digit, stroke and slant.
SHOWN, MOVING = 3, (0, 3, 7)
CAPTIONS = ((7, 2, 0), (7, 0, 2), (0, 2, 1), (3, 0, 1))


def drawn(way: Decoding, labels: list[int], seed: int) -> list[Any]:
    """Ids of one sample each."""
    ids: list[Any] = way.draw(torch.tensor(labels), torch.Generator().manual_seed(seed), SETTINGS).tolist()
    return ids


def main(argv: list[str] | None = None) -> int:
    """Draw and write; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/nar.md.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    images = decodings(zoo.load_model(IMAGES), zoo.load_compared(IMAGES))  # type: ignore[arg-type]
    clips = decodings(zoo.load_model(CLIPS), zoo.load_compared(CLIPS))  # type: ignore[arg-type]
    text: Any = zoo.load_model(TEXT)
    features, mask = zoo.load_text_encoder(TEXT)([caption(*each) for each in CAPTIONS])
    pictures = text.generate(
        text_features=features, text_mask=mask, num_return_sequences=10, temperature=SETTINGS.temperature,
        guidance_scale=SETTINGS.guidance, generator=torch.Generator().manual_seed(args.seed),
    )  # fmt: skip
    content = {
        "seed": args.seed,
        "settings": str(SETTINGS),
        "images": [
            {"way": way.name, "passes": way.passes, "ids": drawn(way, [SHOWN], args.seed),
             "sheet": drawn(way, list(range(10)), args.seed)}
            for way in images
        ],
        "clips": [
            {"way": way.name, "passes": way.passes, "ids": drawn(way, list(MOVING), args.seed)} for way in clips
        ],
        "captions": [
            {"caption": caption(*each), "ids": ids.tolist()}
            for each, ids in zip(CAPTIONS, pictures.split(10), strict=True)
        ],
    }  # fmt: skip
    _atomic.write_text(args.out, json.dumps(content, separators=(",", ":")) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
