"""What decodes the zoo's clips and reads its captions."""

from __future__ import annotations

import json
from typing import Any

from tersor import zoo
from tersor._errors import TersorError
from tersor.grids.nar.captions import LONGEST, WORDS
from tersor.grids.nar.pipeline import TubeletTokenizer, WordFeatures
from tersor.grids.pretrained import load_image_tokenizer


def load_video_tokenizer(name: str) -> TubeletTokenizer:
    """What turns a model's ids into grey clips; raises `ValueError` for a model that makes none."""
    config = json.loads((zoo.path(name) / "config.json").read_text(encoding="utf-8"))
    if len(config.get("grid_size", ())) != 3:
        raise TersorError(f"{name} makes no videos; zoo.load_image_tokenizer is for images")
    images: Any = load_image_tokenizer(name)
    # The frames of a token are the channels of its tokenizer.
    return TubeletTokenizer(images, images.config.channels)


def load_text_encoder(name: str) -> WordFeatures:
    """What turns a model's captions into features; raises `ValueError` for a model that reads none."""
    if not (zoo.path(name) / "captions.json").is_file():
        raise TersorError(f"{name} reads no captions; tiny-nar-text does")
    return WordFeatures(WORDS, LONGEST)
