"""Several questions over one picture: each is asked as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vlm.data import BEFORE, Batch, Layout, draw_batch, tile_processor
from vlm.grounding import Grounding, read, use_grounded_attention
from vlm.train import new_model

from tersor.kv.bench.tiles import KINDS, samples

LAYOUT = Layout(grid=4, questions=3, fillers=5)
SHARES = {kind: 1 / 3 for kind in KINDS}


@pytest.fixture(scope="module")
def processor():
    return tile_processor()


def drawn(processor, layout: Layout = LAYOUT, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return draw_batch(processor, rng, layout, size=2, tiles=(4, 8), closed=True, shares=SHARES)


def alone(batch: Batch, row: int, question: int) -> torch.Tensor:
    """The prompt of one question, up to its question mark."""
    start = int(batch.layout.starts()[question])
    asked = batch.input_ids[row, start : start + batch.layout.fillers + 3]
    return torch.cat([batch.input_ids[row, : batch.layout.prefix], asked])[None]


def test_a_question_among_others_is_read_as_one_asked_alone(processor) -> None:
    """With the library's own positions and mask; the auxiliary path differs in nothing else."""
    model, batch = new_model(3, processor).eval(), drawn(processor)
    use_grounded_attention(model)
    masks = [LAYOUT.sees()] * 8
    with torch.no_grad():
        packed = read(model, batch, Grounding(masks, {}))
        for row, question in ((0, 0), (0, 2), (1, 1)):
            ids = alone(batch, row, question)
            single = model.model(
                input_ids=ids,
                mm_token_type_ids=(ids == processor.image_token_id).int(),
                pixel_values=batch.pixel_values[16 * row : 16 * row + 16],
                image_grid_thw=torch.tensor([[1, 4, 4]]),
                use_cache=False,
            ).last_hidden_state
            mark = int(LAYOUT.rows()[question, -1])
            torch.testing.assert_close(packed[row, mark], single[0, -1], atol=1e-4, rtol=1e-4)


def test_turns_see_what_came_before_them() -> None:
    turns = Layout(grid=4, questions=3, fillers=5, turns=True)
    assert torch.equal(turns.sees(), torch.ones(turns.length, turns.length, dtype=torch.bool).tril())
    position = turns.positions()
    assert torch.equal(position[:, turns.prefix :], BEFORE + 4 + 1 + torch.arange(30).expand(3, -1))
    alone = LAYOUT.positions()[:, LAYOUT.prefix :].unflatten(1, (3, 10))
    assert torch.equal(alone[:, 0], alone[:, 1]) and torch.equal(alone[:, 0], alone[:, 2])
    first, second = (slice(LAYOUT.prefix + 10 * index, LAYOUT.prefix + 10 * index + 10) for index in (0, 1))
    assert not LAYOUT.sees()[second, first].any() and LAYOUT.sees()[second, : LAYOUT.prefix].all()


def test_columns_are_those_of_the_words_and_cells(processor) -> None:
    batch = drawn(processor, seed=4)
    for row in range(2):
        words = processor.tokenizer.convert_ids_to_tokens(batch.input_ids[row].tolist())
        assert {words[column] for column in LAYOUT.is_picture().nonzero()[:, 0].tolist()} == {"<|image_pad|>"}
        for question, columns in enumerate(LAYOUT.rows().tolist()):
            kind, answer = words[columns[0] - 1], words[columns[-1] + 1]
            assert words[columns[-1]] == "?" and words[columns[-1] + 2] == "<eos>"
            assert KINDS[int(batch.kinds[row, question])] == kind
            assert processor.tokenizer.convert_ids_to_tokens(int(batch.answers[row, question])) == answer
            steps = 1 + KINDS.index(kind)
            assert ((batch.cells[row, question] >= 0).sum() == steps) and (
                batch.cells[row, question, :steps] >= 0
            ).all()
    assert int(LAYOUT.is_filler().sum()) == 15


def test_training_sees_pictures_as_the_processor_gives_them(processor) -> None:
    from vlm.processor import patches

    pixels = np.stack([shown.pixels for shown, _ in samples(1, seed=1, grid=4)])
    text = "<bos> <|vision_start|><|image_pad|><|vision_end|> look red ?"
    inputs = processor(text=[text] * 3, images=list(pixels), return_tensors="pt")
    image = processor.image_processor
    assert torch.equal(inputs["pixel_values"], patches(pixels, image.image_mean, image.image_std))
