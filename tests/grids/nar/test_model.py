"""NAR's backbone: sizes, positions and conditions."""

from __future__ import annotations

import math

import pytest
import torch
from nar_models import TEXT, condition, config, model, random_ids

from tersor.grids.nar.heads import NARConfig, NARForImageGeneration
from tersor.grids.nar.model import sincos

PUBLISHED = {
    "B": 130.6e6, "L": 372.5e6, "XL": 816.0e6, "XXL": 1464e6, "M": 295e6, "video-L": 368.7e6, "video-LP": 693.6e6
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name) -> None:
    with torch.device("meta"):
        of = NARForImageGeneration(NARConfig.preset(name))
    assert sum(each.numel() for each in of.parameters()) == pytest.approx(PUBLISHED[name], rel=0.005)


def test_the_text_model_has_its_published_size_too() -> None:
    with torch.device("meta"):
        of = NARForImageGeneration(NARConfig.preset("XL", condition="text", condition_tokens=120))
    assert sum(each.numel() for each in of.parameters()) == pytest.approx(819e6, rel=0.005)


def test_fixed_positions_are_sines_then_cosines() -> None:
    found = sincos(torch.tensor([0, 3]), 4)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(found[1], torch.tensor([math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]))


def test_an_empty_text_is_the_null_condition_and_padding_changes_nothing() -> None:
    of = model((2, 2), **TEXT)
    given = condition(of, padded=True)
    ids = random_ids(of)
    given["text_features"][0, :4] = 0
    first = of(ids, **given).logits
    given["text_features"][0, :4] = 9
    torch.testing.assert_close(of(ids, **given).logits, first)
    empty = {"text_features": given["text_features"], "text_mask": torch.zeros(2, 7)}
    null = of.model.cls_embedding.uncond_embedding.detach().expand(2, -1, -1)
    torch.testing.assert_close(of(ids, **empty).logits, of(ids, text_features=null).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_size": (3,)}, "must be \\(rows, columns\\)"),
        ({"grid_size": (0, 3)}, "at least 1 token"),
        ({"grid_size": (1, 2, 3, 4)}, "must be \\(rows, columns\\)"),
        ({"condition": "image"}, "condition='image' must be one of"),
        ({"position_type": "alibi"}, "position_type='alibi' must be one of"),
        ({"mixing": "gate"}, "mixing='gate' must be one of"),
        ({"mixing": "later"}, "is for videos"),
        ({"flipped_axes": (2,)}, r"flipped_axes=\(2,\) must be among \(0, 1\)"),
        ({"condition_tokens": 3}, "must be 1"),
        ({"head_layers": (0, 1, 1)}, "must have 2 numbers"),
        ({"head_layers": (0, -1)}, "must have 2 numbers"),
        ({"hidden_size": 34}, "multiple of 4 times"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"hidden_size": 8, "grid_size": (2, 2, 2)}, "too small to turn by 3 axes"),
        ({"token_dropout": 1.0}, "token_dropout=1.0"),
        ({"aux_head_loss_weight": -1.0}, "must not be negative"),
    ],
)
def test_bad_sizes(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match="no NAR-S; the published sizes are"):
        NARConfig.preset("S")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_features": torch.zeros(1, 7, 9)}, r"\[batch, tokens, 10\]"),
        ({"text_features": torch.zeros(1, 7, 10), "text_mask": torch.ones(1, 6)}, "like text_features"),
        (
            {"text_features": torch.zeros(1, 7, 10), "text_mask": torch.tensor([[1, 1, 0, 0, 0, 0, 0]])},
            "pad on the left",
        ),
        ({"class_labels": torch.tensor([1])}, "give text_features"),
    ],
)
def test_bad_texts(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        model((2, 2), **TEXT).generate(**given)
