"""The archive of images, and squares of photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tersor import zoo
from tersor.ptq.bench.data import ARCHIVE, load_cifar, photo_crops


def test_squares_of_photographs_are_the_photographs() -> None:
    file = zoo.photos()[0]
    crops = photo_crops([file])
    with Image.open(file) as opened:
        whole = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    assert crops.shape == (6 * 4 + 3 * 2, 3, 32, 32) and torch.equal(crops[1], whole[:, :32, 32:64])


def test_the_archive_is_read_as_it_is_named(data, tmp_path) -> None:
    split = load_cifar(data)
    assert (
        len(split.train) == len(split.held_out) == 40
        and split.classes == zoo.load_network("tiny-repvgg").config.classes
    )
    assert split.held_out.labels.bincount().tolist() == [4] * 10
    with pytest.raises(ValueError, match=rf"no {ARCHIVE} in this folder; pack one from CIFAR-10"):
        load_cifar(tmp_path)
    (tmp_path / ARCHIVE).write_bytes(b"no zip")
    with pytest.raises(ValueError, match="cannot be read"):
        load_cifar(tmp_path)
