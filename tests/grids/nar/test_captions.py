"""Captions come from pictures, and are found in pictures again."""

from __future__ import annotations

import pytest
import torch

from tersor.grids.nar.captions import LONGEST, WORDS, Captions, caption, slant, thickness


def bar(width: float, lean: float, size: int = 28) -> torch.Tensor:
    """An upright stroke of some width, that moves ``lean`` to the right for each pixel that it rises."""
    y, x = torch.meshgrid(torch.arange(size) - 13.5, torch.arange(size) - 13.5, indexing="ij")
    ink = (width / 2 + 0.5 - (x + lean * y).abs()).clamp(0, 1) * (y.abs() <= 9)
    return ink[None, None]


def test_thickness_and_slant_are_measured() -> None:
    assert slant(bar(3, 0.25)).item() == pytest.approx(0.25, abs=0.02)
    assert slant(bar(3, -0.4)).item() == pytest.approx(-0.4, abs=0.02)
    assert thickness(bar(2, 0)) < thickness(bar(3, 0)) < thickness(bar(5, 0))
    shifted = bar(3, 0.25).roll((3, -2), (-2, -1))
    torch.testing.assert_close(slant(shifted), slant(bar(3, 0.25)))
    blank = torch.zeros(1, 1, 28, 28)
    assert slant(blank).item() == 0 and thickness(blank).item() == 0


def test_captions_come_back_from_pictures(tmp_path) -> None:
    images = torch.cat([bar(width, lean) for width in (2, 3, 5) for lean in (-0.3, 0.0, 0.3)])
    captions = Captions.fit(images)
    strokes, sides = captions.classes(images)
    assert strokes.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and sides.tolist() == [0, 1, 2] * 3
    captions.save(tmp_path)
    assert Captions.load(tmp_path) == captions
    with pytest.raises(ValueError, match="no captions"):
        Captions.load(tmp_path / "other")
    assert caption(7, 2, 0) == "a thick seven slanted left" and caption(0, 1, None) == "a zero"
    longest = [caption(digit, 2, side).split() for digit in range(10) for side in range(3)]
    assert max(map(len, longest)) == LONGEST and {word for each in longest for word in each} < set(WORDS)
