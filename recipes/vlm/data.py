"""Batches of tile pictures: several questions stand over one picture, each as if it were asked alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vlm.processor import SPECIAL, new_processor, patches

from tersor.kv.bench.tiles import COLOURS, FILLER, KINDS, Picture, Question, picture
from tersor.zoo.processor import PictureProcessor

IGNORED = -100
#: Tokens before the picture, <bos> <|vision_start|>, and after it, <|vision_end|>.
BEFORE, AFTER = 2, 1
MOST_STEPS = 3


def tile_processor() -> PictureProcessor:
    """The processor of tiny-vlm."""
    return new_processor([*KINDS, *COLOURS, "?", *dict.fromkeys(FILLER)])


@dataclass(frozen=True)
class Layout:
    """Where things stand in every row of a batch: the picture, then ``questions`` of ``fillers`` words each.

    Args:
        grid: Cells on a side of the picture.
        questions: Questions over one picture.
        fillers: Words between a question's colour and its question mark.
        turns: Whether a question also sees the earlier ones and their answers, as later turns of a dialogue do.
    """

    grid: int
    questions: int
    fillers: int
    turns: bool = False

    @property
    def prefix(self) -> int:
        return BEFORE + self.grid**2 + AFTER

    @property
    def each(self) -> int:
        """Tokens of a question: kind, colour, fillers, question mark, answer, <eos>."""
        return self.fillers + 5

    @property
    def length(self) -> int:
        return self.prefix + self.questions * self.each

    def starts(self) -> Tensor:
        """Column of each question's first word, ``[questions]``."""
        return self.prefix + self.each * torch.arange(self.questions)

    def rows(self) -> Tensor:
        """Columns from the colour to the question mark, ``[questions, fillers + 2]``; all of them are trained."""
        return self.starts()[:, None] + torch.arange(1, self.fillers + 3)

    def is_picture(self) -> Tensor:
        """bool ``[length]``."""
        columns = torch.arange(self.length)
        return (columns >= BEFORE) & (columns < BEFORE + self.grid**2)

    def is_filler(self) -> Tensor:
        """bool ``[length]``."""
        found = torch.zeros(self.length, dtype=torch.bool)
        found[self.rows()[:, 1:-1].reshape(-1)] = True
        return found

    def sees(self) -> Tensor:
        """What attends to what, bool ``[length, length]``: the causal past, without other questions unless `turns`."""
        owner = torch.zeros(self.length, dtype=torch.long)
        owner[self.prefix :] = 1 + torch.arange(self.questions).repeat_interleave(self.each)
        allowed = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        return allowed if self.turns else allowed & ((owner == 0) | (owner == owner[:, None]))

    def positions(self) -> Tensor:
        """Positions ``[3, length]`` in time, height and width, as the model gives them to a question asked alone."""
        cell = torch.arange(self.grid**2)
        picture = torch.stack([torch.zeros_like(cell), cell // self.grid, cell % self.grid]) + BEFORE
        after = BEFORE + self.grid
        asked = torch.arange(self.questions * self.each)
        text = after + AFTER + (asked if self.turns else asked % self.each)
        flat = [torch.arange(BEFORE), torch.arange(after, after + AFTER), text]
        before, end, questions = (part.expand(3, -1) for part in flat)
        return torch.cat([before, picture, end, questions], 1)


@dataclass(frozen=True)
class Batch:
    """A batch in one `Layout`.

    Args:
        layout: Where things stand.
        input_ids: Tokens ``[pictures, length]``.
        pixel_values: Patches ``[pictures * cells, 192]``.
        answers: Token of each answer, ``[pictures, questions]``.
        cells: Column of the cell that each step reads, ``[pictures, questions, 3]``; -1 for a step that there is not.
        kinds: Number of each question's kind, ``[pictures, questions]``.
    """

    layout: Layout
    input_ids: Tensor
    pixel_values: Tensor
    answers: Tensor
    cells: Tensor
    kinds: Tensor


def draw_questions(
    shown: Picture, rng: np.random.Generator, layout: Layout, shares: Mapping[str, float]
) -> list[Question]:
    """Questions about one picture: its keys in turn from a random one on, of random kinds."""
    first, kinds = int(rng.integers(len(shown.tiles))), list(shares)
    return [
        shown.ask(
            kinds[int(rng.choice(len(kinds), p=list(shares.values())))],
            shown.tiles[(first + index) % len(shown.tiles)].key,
            fillers=layout.fillers,
            start=int(rng.integers(len(FILLER))),
        )
        for index in range(layout.questions)
    ]


def draw_batch(
    processor: PictureProcessor,
    rng: np.random.Generator,
    layout: Layout,
    *,
    size: int,
    tiles: tuple[int, int],
    closed: bool,
    shares: Mapping[str, float],
) -> Batch:
    """A random batch.

    Args:
        processor: Of the model.
        rng: What the batch is drawn from.
        layout: Where things stand.
        size: Number of pictures.
        tiles: Least and most tiles of a picture.
        closed: Whether every tile points to another.
        shares: How often each kind is asked.
    """
    tokenizer, image = processor.tokenizer, processor.image_processor
    pictures = [
        picture(rng, grid=layout.grid, tiles=int(rng.integers(tiles[0], tiles[1] + 1)), closed=closed)
        for _ in range(size)
    ]
    asked = [draw_questions(shown, rng, layout, shares) for shown in pictures]
    head = tokenizer(f"{SPECIAL[1]} {SPECIAL[3]}")["input_ids"]
    head += [processor.image_token_id] * layout.grid**2 + tokenizer(SPECIAL[4])["input_ids"]
    texts = [" ".join(f"{question.text} {question.answer} <eos>" for question in row) for row in asked]
    input_ids = torch.tensor([head + row for row in tokenizer(texts)["input_ids"]])
    cells = torch.full((size, layout.questions, MOST_STEPS), -1)
    for row, questions in enumerate(asked):
        for index, question in enumerate(questions):
            read = [BEFORE + y * layout.grid + x for y, x in question.steps]
            cells[row, index, : len(read)] = torch.tensor(read)
    return Batch(
        layout,
        input_ids,
        patches(np.stack([shown.pixels for shown in pictures]), image.image_mean, image.image_std),
        input_ids[:, layout.starts() + layout.fillers + 3],
        cells,
        torch.tensor([[KINDS.index(question.kind) for question in row] for row in asked]),
    )
