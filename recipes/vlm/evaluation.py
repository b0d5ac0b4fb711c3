"""Scores of tiny-vlm, and where it reads the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from shared.lock import share_of
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from vlm.data import Batch, Layout, draw_batch
from vlm.grounding import READING, Grounding, read, use_grounded_attention

from tersor.kv.bench.tiles import KINDS, samples
from tersor.zoo.processor import PictureProcessor

BATCH = 32
Shares = dict[str, dict[str, float]]


@torch.no_grad()
def score(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: PictureProcessor,
    *,
    grid: int,
    fillers: int,
    n: int,
    seed: int,
) -> Shares:
    """Share of right answers by kind of question, with its Wilson interval, by the library's own forward."""
    model.eval()
    right = dict.fromkeys(KINDS, 0)
    tiles = min(8, grid)
    for kind in KINDS:
        drawn = samples(n, kinds=(kind,), seed=seed, grid=grid, tiles=tiles, fillers=fillers)
        for start in range(0, n, BATCH):
            part = drawn[start : start + BATCH]
            prompts = [f"<bos> <|vision_start|><|image_pad|><|vision_end|> {question.text}" for _, question in part]
            inputs = processor(text=prompts, images=[shown.pixels for shown, _ in part], return_tensors="pt")
            tokens = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].argmax(-1)
            answers = processor.tokenizer.convert_ids_to_tokens(tokens.tolist())
            right[kind] += sum(said == asked.answer for said, (_, asked) in zip(answers, part, strict=True))
    return {kind: share_of(hits, n) for kind, hits in right.items()}


def hiding_layers(layers: set[int]) -> Callable[[Layout, int], Tensor]:
    """A mask by layout and layer: in ``layers`` nothing after the picture sees it."""

    def mask(layout: Layout, layer: int) -> Tensor:
        after = torch.arange(layout.length) >= layout.prefix - 1
        return layout.sees() & ~(after[:, None] & layout.is_picture()) if layer in layers else layout.sees()

    return mask


def cells_alone(layout: Layout, layer: int) -> Tensor:
    """A mask in which no cell sees another."""
    picture, itself = layout.is_picture(), torch.eye(layout.length, dtype=torch.bool)
    return layout.sees() & ~(picture[:, None] & picture & ~itself)


def views(layers: int) -> dict[str, Callable[[Layout, int], Tensor]]:
    """What the question sees of the picture in the rows of the mask test, by name."""
    first, everything = READING[0], set(range(layers))
    hidden = {
        "everywhere": set(),
        f"only from layer {first} on": set(range(first)),
        f"only before layer {first}": everything - set(range(first)),
        **{f"not in layer {layer}": {layer} for layer in range(layers)},
    }
    return {name: hiding_layers(gone) for name, gone in hidden.items()} | {"everywhere, cells alone": cells_alone}


def expected_right(view: str, kind: str) -> bool:
    """Whether a question of ``kind`` can be answered with that view of the picture: step s is read in `READING` s."""
    if view == f"only before layer {READING[0]}":
        return False
    steps = READING[: 1 + KINDS.index(kind)]
    return view not in {f"not in layer {layer}" for layer in steps}


@torch.no_grad()
def mask_test(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: PictureProcessor,
    *,
    pictures: int,
    questions: int = 12,
    grid: int = 8,
    fillers: int = 16,
    seed: int = 0,
) -> dict[str, Shares]:
    """Share of right answers by view and kind; ``pictures`` x ``questions`` questions of each kind."""
    layout = Layout(grid, questions, fillers)
    count = model.config.get_text_config().num_hidden_layers
    batches = [
        draw_batch(
            processor, np.random.default_rng([seed, index]), layout, size=pictures, tiles=(8, 8), closed=True,
            shares={kind: 1.0},
        )
        for index, kind in enumerate(KINDS)
    ]  # fmt: skip
    found = {}
    with grounded(model):
        for name, mask in views(count).items():
            masks = [mask(layout, layer) for layer in range(count)]
            found[name] = {
                kind: share_of(int(right(model, batch, Grounding(masks, {})).sum()), pictures * questions)
                for kind, batch in zip(KINDS, batches, strict=True)
            }
    return found


def right(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, grounding: Grounding) -> Tensor:
    """Which answers are right, bool ``[pictures, questions]``."""
    hidden = read(model, batch, grounding)[:, batch.layout.rows()[:, -1]]
    return model.lm_head(hidden).argmax(-1) == batch.answers


@contextmanager
def grounded(model: Qwen2_5_VLForConditionalGeneration) -> Iterator[None]:
    """Within it, the model attends by given masks."""
    before = model.config._attn_implementation
    use_grounded_attention(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
