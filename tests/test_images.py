"""Lists of picture files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hostile import PICTURES, png

from tersor._images import PictureError, as_seen, image_files, opened, read_frames, read_picture


def test_pictures_are_found_by_their_ending_and_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt", "sub/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [each.name for each in image_files(tmp_path)] == ["a.jpg", "b.PNG", "c.webp"]
    assert [each.name for each in image_files(tmp_path, below=False)] == ["a.jpg", "b.PNG"]


def test_names_count_as_people_do_and_hidden_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("a10.png", "a2.png", "a01.png", ".hidden.png", ".thumbs/a1.png", "b/a3.TIFF"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [each.name for each in image_files(tmp_path)] == ["a01.png", "a2.png", "a10.png", "a3.TIFF"]
    below = tmp_path / ".cache" / "photos"
    below.mkdir(parents=True)
    (below / "1.gif").touch()
    assert len(image_files(below)) == 1, "a hidden folder that is asked for is looked into"


@pytest.mark.parametrize(
    "what",
    ["turned", "16 bits", "32 bits", "palette", "cut-out palette", "CMYK", "alpha", "grey alpha", "bits", "frames"],
)
def test_pictures_are_read_as_a_viewer_shows_them(what: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    red = image.new("RGB", (3, 1), "red")
    exif, half = image.Exif(), image.new("RGBA", (3, 1), (255, 0, 0, 51))
    exif[0x0112] = 6
    palette = image.new("P", (3, 1), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    wide, mask = np.full((1, 3), 128 * 257, dtype=np.uint16), image.new("L", (3, 1), 51)
    made, options, expected = {
        "turned": (red, {"exif": exif}, ("RGB", (1, 3), (255, 0, 0))),
        "16 bits": (image.fromarray(wide), {}, ("L", (3, 1), 128)),
        "32 bits": (image.fromarray(wide.astype(np.int32)), {}, ("L", (3, 1), 128)),
        "palette": (palette, {}, ("RGB", (3, 1), (255, 0, 0))),
        "cut-out palette": (palette, {"transparency": 1}, ("RGB", (3, 1), (255, 255, 255))),
        "CMYK": (red.convert("CMYK"), {}, ("RGB", (3, 1), (254, 0, 0))),
        "alpha": (half, {}, ("RGB", (3, 1), (255, 204, 204))),
        "grey alpha": (image.merge("LA", (image.new("L", (3, 1), 0), mask)), {}, ("L", (3, 1), 204)),
        "bits": (image.new("1", (3, 1), 1), {}, ("L", (3, 1), 255)),
        "frames": (red, {"save_all": True, "append_images": [half]}, ("RGB", (3, 1), (255, 0, 0))),
    }[what]  # fmt: skip
    file = tmp_path / f"it.{'tiff' if what in ('CMYK', '32 bits', 'two frames') else 'png'}"
    made.save(file, **options)
    with opened(file) as picture:
        seen = as_seen(picture)
    assert (seen.mode, seen.size) == expected[:2]
    assert np.abs(np.asarray(seen)[0, 0].astype(int) - expected[2]).max() <= 1
    assert read_picture(file).mode == "RGB" and read_picture(file).size == expected[1]


def test_pixels_that_are_no_shades_are_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, values in (("float", np.full((2, 2), 0.5, dtype=np.float32)), ("deep", np.full((2, 2), 70000, np.int32))):
        image.fromarray(values).save(tmp_path / f"{name}.tiff")
        with pytest.raises(PictureError, match=rf"{name}\.tiff has neither 8 nor 16 bits"):
            read_picture(tmp_path / f"{name}.tiff")


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
