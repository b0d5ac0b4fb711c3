"""What all image tokenizers check."""

from __future__ import annotations

import pytest
import torch

from tersor.grids.pixels import check_ids, check_images, divided, to_unit


def test_sides_are_counted_in_patches() -> None:
    assert divided((28, 14), 7) == (4, 2)
    for size in ((28, 15), (28, 0)):
        with pytest.raises(ValueError, match="multiple of 7 pixels"):
            divided(size, 7)


def test_images_are_floats_with_the_right_channels() -> None:
    check_images(torch.zeros(2, 3, 4, 4), 3)
    for images in (torch.zeros(2, 1, 4, 4), torch.zeros(3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"\[batch, 3, height, width\]"):
            check_images(images, 3)


def test_ids_are_grids_that_the_codebook_has() -> None:
    check_ids(torch.tensor([[[0, 7]]]), 8)
    for ids in (torch.tensor([[[8]]]), torch.tensor([[[-1]]]), torch.tensor([[1]]), torch.zeros(1, 1, 1)):
        with pytest.raises(ValueError, match="from 0 to 7"):
            check_ids(ids, 8)


def test_what_networks_speak_becomes_pixels() -> None:
    assert to_unit(torch.tensor([-1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0.5, 1, 1]
