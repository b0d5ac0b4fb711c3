"""Lists of picture files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile import PICTURES, png

from tersor._images import PictureError, image_files, read_frames, read_picture


def test_pictures_are_found_by_their_ending_and_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt", "sub/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [each.name for each in image_files(tmp_path)] == ["a.jpg", "b.PNG", "c.webp"]
    assert [each.name for each in image_files(tmp_path, below=False)] == ["a.jpg", "b.PNG"]


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pictures"):
        image_files(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        image_files(tmp_path / "none")


def test_pictures_are_read_in_colour_and_frames_one_by_one(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    frames = [image.new("L", (6, 4), 60 * number) for number in range(3)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{number}.png")
    assert read_picture(tmp_path / "frames" / "1.png").mode == "RGB"
    for path in (tmp_path / "film.gif", tmp_path / "frames"):
        assert [frame.getpixel((0, 0))[0] for frame in read_frames(path)] == [0, 60, 120]


@pytest.mark.parametrize("what", PICTURES)
def test_what_is_no_picture_is_refused_and_named(what: str, tmp_path: Path) -> None:
    PICTURES[what](tmp_path / "it.png")
    with pytest.raises(PictureError, match=r"--image .*it\.png"):
        read_picture(tmp_path / "it.png", option="--image")


def test_films_are_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "film.mp4").touch()
    with pytest.raises(ValueError, match="ffmpeg"):
        read_frames(tmp_path / "film.mp4")
    monkeypatch.setattr("tersor._images.MOST_FRAMES", 1)
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(2, 2, bytes(6)))
    with pytest.raises(ValueError, match="2 frames; give at most 1"):
        read_frames(tmp_path)
