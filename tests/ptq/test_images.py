"""Folders of images: what is read, cropped, left out and refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tersor._images import image_files
from tersor.ptq import report as ptq_report
from tersor.ptq.images import Preprocessing, find_classes, read_folder, read_images


def test_unreadable_files_are_left_out_until_they_are_too_many(tmp_path) -> None:
    plain = Preprocessing(size=32, mean=(0.5,) * 3, deviation=(0.25,) * 3)
    for index in range(12):
        Image.new("L", (40, 50), color=10 * index).save(tmp_path / f"{index:02}.png")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "00.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"2 of 14 images cannot be read, .*bad.jpg first"):
        read_folder(tmp_path, plain, count=99, seed=0)
    (tmp_path / "cut.png").unlink()
    images, kept = read_images(image_files(tmp_path), plain)
    assert images.shape == (12, 3, 32, 32) and len(kept) == 12
    assert torch.isclose(images.amax(), torch.tensor((110 / 255 - 0.5) / 0.25))
    told: list[str] = []
    read_folder(tmp_path, plain, count=99, seed=0, tell=told.append)
    assert told == [f"skipped 1 of 13 files, which cannot be read: {tmp_path / 'bad.jpg'}"]
    some = read_folder(tmp_path, plain, count=5, seed=0)
    assert len(some) >= 4 and torch.equal(some, read_folder(tmp_path, plain, count=5, seed=0))


def test_preprocessing_crops_the_middle() -> None:
    picture = Image.new("RGB", (64, 32), (255, 0, 0))
    picture.paste((0, 255, 0), (16, 0, 48, 32))
    found = Preprocessing(size=32, interpolation="nearest", mean=(0.0,) * 3, deviation=(1.0,) * 3)(picture)
    assert torch.equal(found[1], torch.ones(32, 32)) and torch.equal(found[0], torch.zeros(32, 32))


def test_classes_are_the_folders_in_order(tmp_path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "x.png")
    assert [label for _, label in find_classes(tmp_path, 2)] == [0, 1]
    with pytest.raises(ValueError, match="2 folders with images, and the network 3 classes"):
        find_classes(tmp_path, 3)
    parts = list(ptq_report.batches(find_classes(tmp_path, 2), Preprocessing(size=32)))
    assert len(parts) == 1 and parts[0][0].shape == (2, 3, 32, 32) and parts[0][1].tolist() == [0, 1]


def test_one_small_picture_is_enlarged_and_named_and_many_are_refused(tmp_path) -> None:
    plain = Preprocessing(size=32)
    for index in range(8):
        Image.new("L", (40, 50)).save(tmp_path / f"{index}.png")
    Image.new("L", (20, 10), color=255).save(tmp_path / "thumb.png")
    for seed in range(6):
        read_folder(tmp_path, plain, count=4, seed=seed)  # whether it is drawn or not
    told: list[str] = []
    assert len(read_folder(tmp_path, plain, count=99, seed=0, tell=told.append)) == 9
    assert told == [f"enlarged 1 images smaller than 32 x 32: {tmp_path / 'thumb.png'}"]
    Image.new("L", (20, 20)).save(tmp_path / "second.png")
    with pytest.raises(ValueError, match=r"second.png is 20 x 20 pixels; the network takes 32 x 32, and 2 of 10"):
        read_folder(tmp_path, plain, count=99, seed=0)
