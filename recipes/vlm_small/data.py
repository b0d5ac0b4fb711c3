"""Batches of tile pictures with several questions each, in the form that the model's processor gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5_VLProcessor
from vlm.processor import new_processor, patches
from vlm_small.tiles import COLOURS, KINDS, MOST_COUNTED, Picture, Question, picture

from tersor.zoo.processor import PictureProcessor

IGNORED = -100


def tile_processor() -> PictureProcessor:
    """The processor of tiny-vlm-small."""
    return new_processor([*KINDS, *COLOURS, *(str(n) for n in range(MOST_COUNTED + 1))])


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of the model, and the labels: answers and the end of each turn."""

    inputs: dict[str, Tensor]
    labels: Tensor


def draw_questions(shown: Picture, rng: np.random.Generator, *, turns: int, lookups: float) -> list[Question]:
    """Different questions about one picture: a repeated one could be answered by copying.

    The colour on most tiles is always counted, since large counts are rare; about ``lookups`` of the others are "color"
    questions, and no more colours that are on no tile than there is nothing else to ask.
    """
    present = [c for c in rng.permutation(shown.colours("count")).tolist() if shown.keyed(c)]
    absent = [c for c in rng.permutation(shown.colours("count")).tolist() if not shown.keyed(c)]
    most = max(present, key=lambda c: len(shown.keyed(c)))
    looked = rng.permutation(shown.colours("color")).tolist()[: int(rng.binomial(turns - 1, lookups))]
    others = [c for c in present if c != most] + absent[:1]
    counted = [most, *rng.permutation(others).tolist(), *absent[1:]][: turns - len(looked)]
    asked = [("color", colour) for colour in looked] + [("count", colour) for colour in counted]
    return [shown.ask(*asked[index]) for index in rng.permutation(len(asked))]


def draw_batch(
    processor: Qwen2_5_VLProcessor, rng: np.random.Generator, *, size: int, grid: int, turns: int, lookups: float
) -> Batch:
    """``size`` pictures of 1 to 6 tiles with ``turns`` questions each, see `draw_questions`."""
    tokenizer, image = processor.tokenizer, processor.image_processor
    pictures = [picture(rng, grid=grid, tiles=int(rng.integers(1, 7))) for _ in range(size)]
    head = tokenizer("<bos> <|vision_start|>")["input_ids"]
    head += [processor.image_token_id] * grid**2 + tokenizer("<|vision_end|>")["input_ids"]
    rows, labels = [], []
    for shown in pictures:
        ids, wanted = list(head), [IGNORED] * len(head)
        for question in draw_questions(shown, rng, turns=turns, lookups=lookups):
            turn = tokenizer(f"{question.text} {question.answer} <eos>")["input_ids"]
            ids += turn
            wanted += [IGNORED, IGNORED, *turn[2:]]
        rows.append(ids)
        labels.append(wanted)
    input_ids = torch.tensor(rows)
    return Batch(
        {
            "input_ids": input_ids,
            "mm_token_type_ids": (input_ids == processor.image_token_id).int(),
            "pixel_values": patches(np.stack([shown.pixels for shown in pictures]), image.image_mean, image.image_std),
            "image_grid_thw": torch.tensor([[1, grid, grid]] * size),
        },
        torch.tensor(labels),
    )
