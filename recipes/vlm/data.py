"""Batches of tile pictures with several questions each, in the form that the model's processor gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5_VLProcessor

from tersor.kv.bench.tiles import CELL, Picture, Question, picture

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of the model, and the labels: answers and the end of each turn."""

    inputs: dict[str, Tensor]
    labels: Tensor


def patches(pixels: np.ndarray, mean: list[float], std: list[float]) -> Tensor:
    """Normalized patches ``[cells, 3 * 8 * 8]`` of uint8 pictures ``[batch, height, width, 3]``, row by row.

    What the processor does to a picture whose sides are multiples of a patch, without its resizing.
    """
    batch, height, width, _ = pixels.shape
    scaled = (torch.from_numpy(pixels).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    cells = scaled.reshape(batch, height // CELL, CELL, width // CELL, CELL, 3)
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(-1, 3 * CELL * CELL)


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
