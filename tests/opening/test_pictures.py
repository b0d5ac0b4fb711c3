"""Pictures for judges."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from tersor._errors import TersorError
from tersor.opening.pictures import as_jpeg, confined, fault, fitted, read_rgb


@pytest.mark.parametrize(
    ("size", "wanted"), [((1000, 500), (512, 256)), ((300, 600), (256, 512)), ((40, 20), (40, 20))]
)
def test_the_longest_side_is_limited_and_the_aspect_kept(size, wanted) -> None:
    assert fitted(Image.new("RGB", size), 512).size == wanted
    assert fitted(Image.new("RGB", size), 512, "square").size == (512, 512)


def test_any_kind_becomes_a_jpeg_and_an_animation_its_first_frame(tmp_path) -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_rgb(tmp_path / "a.gif").getpixel((0, 0))[0] > 200
    with Image.open(io.BytesIO(as_jpeg(tmp_path / "a.gif", 512))) as picture:
        assert picture.format == "JPEG"
    assert fault(tmp_path / "a.gif") is None and fault(tmp_path / "b.gif") == "is missing"


def test_paths_stay_below_their_root(tmp_path) -> None:
    assert confined(tmp_path, "./a/../b.jpg") == tmp_path / "a/../b.jpg"
    (tmp_path / "link").symlink_to(tmp_path.parent)
    for name in ("../x", "/x", "link/x", "a/../../x"):
        with pytest.raises(TersorError, match="leads out"):
            confined(tmp_path, name)
