"""What training does to attention: it hides, leaves out and says where heads should look, and nothing of it stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vlm.data import Layout, draw_batch, tile_processor
from vlm.grounding import (
    EARLY,
    READING,
    Grounding,
    attention_to,
    draw_grounding,
    grounded_attention,
    grounding_loss,
    read,
    use_grounded_attention,
)
from vlm.train import new_model

LAYOUT = Layout(grid=4, questions=2, fillers=4)


@pytest.fixture(scope="module")
def processor():
    return tile_processor()


@pytest.fixture
def model(processor):
    made = new_model(5, processor)
    use_grounded_attention(made)
    return made


@pytest.fixture(scope="module")
def batch(processor):
    rng = np.random.default_rng(2)
    return draw_batch(processor, rng, LAYOUT, size=2, tiles=(8, 8), closed=True, shares={"chain": 0.5, "trail": 0.5})


def plain() -> Grounding:
    return Grounding([LAYOUT.sees()] * 8, {})


def test_where_heads_look_is_what_attention_computes(model, batch) -> None:
    """Against the library's own attention weights."""
    grounding = plain()
    with torch.no_grad():
        read(model, batch, grounding)
        model.set_attn_implementation("eager")
        size = len(batch.input_ids)
        cells = model.model.visual(batch.pixel_values, grid_thw=torch.tensor([[1, 4, 4]] * size)).pooler_output
        embedded = model.get_input_embeddings()(batch.input_ids)
        hidden = torch.zeros(LAYOUT.length, LAYOUT.length).masked_fill(~LAYOUT.sees(), -torch.inf)[None, None]
        weights = model.model.language_model(
            inputs_embeds=embedded.masked_scatter(LAYOUT.is_picture()[:, None], cells),
            attention_mask={"full_attention": hidden},
            position_ids=LAYOUT.positions()[:, None].expand(-1, size, -1),
            output_attentions=True,
        ).attentions
    rows, columns = LAYOUT.rows().flatten(), torch.full((2, 12), 5)
    for layer, head in ((0, 1), (5, 0), (7, 3)):
        ours = attention_to(grounding, layer, head, rows, columns).exp()
        torch.testing.assert_close(ours, weights[layer][:, head, rows, 5], atol=1e-5, rtol=1e-4)


def test_the_loss_reaches_the_queries_of_every_layer_it_speaks_of(model, batch) -> None:
    grounding = plain()
    read(model, batch, grounding)
    grounding_loss(grounding, batch, torch.ones(2, 2, 6, dtype=torch.bool)).backward()
    for layer in (*EARLY, *READING):
        assert model.model.language_model.layers[layer].self_attn.q_proj.weight.grad.abs().sum() > 0, layer


def test_rows_that_are_not_taught_do_not_count(model, batch) -> None:
    grounding = plain()
    with torch.no_grad():
        read(model, batch, grounding)
        some = torch.ones(2, 2, 6, dtype=torch.bool)
        everything = grounding_loss(grounding, batch, some)
        some[:, :, 2:5] = False
        fewer = grounding_loss(grounding, batch, some)
        query, key = grounding.states[3]
        query = query.clone()
        query[:, :, LAYOUT.rows()[:, 2:5].flatten()] += 3.0
        grounding.states[3] = query, key
        assert grounding_loss(grounding, batch, some) == fewer != everything
        assert grounding_loss(grounding, batch, torch.ones_like(some)) != everything


def test_blind_layers_do_not_show_the_picture_to_the_question() -> None:
    grounding = draw_grounding(LAYOUT, 8, np.random.default_rng(0), blind=True, left_out=False)
    after, picture = torch.arange(LAYOUT.length) >= LAYOUT.prefix - 1, LAYOUT.is_picture()
    for layer, mask in enumerate(grounding.masks):
        assert mask[after][:, picture].any() == (layer not in EARLY)
        assert torch.equal(mask[~after], LAYOUT.sees()[~after])
    assert not grounding.left_out


def test_left_out_tokens_give_nothing_and_are_seen_by_none() -> None:
    rng = np.random.default_rng(1)
    grounding = draw_grounding(LAYOUT, 8, rng, blind=False, left_out=True, all_fillers=1.0)
    assert torch.equal(grounding.left_out[0], LAYOUT.is_filler()), "all of the first layer"
    assert tuple(grounding.left_out) == EARLY
    for layer, gone in grounding.left_out.items():
        assert not (gone & ~LAYOUT.is_filler()).any(), "kind, colour and question mark always take part"
        others = grounding.masks[layer][:, gone]
        assert others.sum() == gone.sum() and others[gone].diagonal().all()

    class Module:
        layer_idx = 0

    query, key = torch.randn(1, 4, LAYOUT.length, 8), torch.randn(1, 2, LAYOUT.length, 8)
    out, _ = grounded_attention(Module(), query, key, key, None, grounding)
    assert torch.equal(out[0].abs().sum((1, 2)) == 0, grounding.left_out[0])


def test_without_a_grounding_attention_is_the_library_s(model) -> None:
    ids = torch.randint(7, 70, (2, 9))
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        model.set_attn_implementation("sdpa")
        assert torch.equal(ours, model(input_ids=ids).logits)
