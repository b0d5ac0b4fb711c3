"""Rotary angles by coordinates."""

from __future__ import annotations

import torch
from nar_models import TEXT, model
from raster_models import TEXT_CONDITION, llamagen_config

from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.rotary import rotary_table, rotary_widths, turn


def test_rotary_widths_are_even_and_as_equal_as_can_be() -> None:
    assert rotary_widths(64, 2) == [32, 32]
    assert rotary_widths(64, 3) == [20, 22, 22]
    assert rotary_widths(80, 3) == [26, 26, 28]


def test_two_axes_turn_like_llamagen_and_three_turn_each() -> None:
    of, raster = (
        model((3, 4), **TEXT),
        LlamaGen(
            LlamaGenConfig(
                hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=4, grid_size=(3, 4), **TEXT
            )
        ),
    )
    places = torch.arange(7 + 12)
    ours, theirs = of.model.rotation((3, 4)), raster.rotation(places[None])
    assert all(torch.equal(one, other[0]) for one, other in zip(ours, theirs, strict=True))
    x = torch.randn(2, len(places), 4, 16, generator=torch.Generator().manual_seed(0))
    # As complex numbers; the prefix's factors are zero.
    factors = torch.view_as_complex(rotary_table(places, (3, 4), 16, 7, 10000.0)[0])[:, None]
    turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * factors).flatten(-2)
    torch.testing.assert_close(turn(x, ours), turned)
    table = rotary_table(torch.arange(1 + 24), (2, 3, 4), 16, 1, 10000.0)[0]
    # Head of 16: 2, 3 and 3 pairs. The cell (1, 2, 3) is place 1 + 12 + 8 + 3.
    angle = torch.tensor(
        [1.0, 1e-2, *(2 * 10000.0 ** -(torch.arange(3) / 3)), *(3 * 10000.0 ** -(torch.arange(3) / 3))]
    )
    torch.testing.assert_close(table[24], torch.stack([angle.cos(), angle.sin()], -1))
    assert (table[0] == 0).all()


def test_rotation_turns_by_row_and_column_and_zeroes_the_prefix() -> None:
    model = LlamaGen(llamagen_config(**TEXT_CONDITION))
    positions = torch.tensor([[0, 5, 6, 6 + 2 * 4 + 3]])
    cosine, sine = (each[0, :, 0] for each in model.rotation(positions))
    assert cosine.shape == sine.shape == (4, 8)
    assert (cosine[:2] == 0).all() and (sine[:2] == 0).all(), "prefix: zeros, not cos = 1"
    assert torch.equal(cosine[2], torch.ones(8)) and (sine[2] == 0).all(), "the first cell is not turned"
    # head_dim 8: two frequencies, 1 and 10000 ** -0.5, for the row 2, then the same for the column 3.
    angles = torch.tensor([2.0, 2.0 / 100, 3.0, 3.0 / 100])
    torch.testing.assert_close(cosine[3].view(4, 2), torch.stack([angles.cos(), angles.cos()], -1))
    torch.testing.assert_close(sine[3].view(4, 2), torch.stack([-angles.sin(), angles.sin()], -1))


def test_neighbouring_channels_turn_together() -> None:
    x = torch.randn(1, 1, 1, 8)
    angle = torch.tensor([0.3, 0.5, 0.7, 0.9])
    turned = turn(x, (angle.cos().repeat_interleave(2), torch.stack([-angle.sin(), angle.sin()], -1).flatten()))
    pairs = torch.view_as_complex(x.view(4, 2)) * torch.polar(torch.ones(4), angle)
    torch.testing.assert_close(turned.flatten(), torch.view_as_real(pairs).flatten())
