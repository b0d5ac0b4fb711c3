"""Pictures of the decoding order and of images, read back by other programs' parsers."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from tersor.grids.drawing import Panel, as_png, as_svg, compare_svg, one_a_pass, samples_svg, write_gif
from tersor.grids.geometry import RasterGrid
from tersor.grids.schedule import ZipARSchedule

ORDER = ZipARSchedule(RasterGrid(4, 5, end_of_row=True), 2, "eol")


def test_the_svg_lights_every_cell_up_in_its_pass() -> None:
    root = ElementTree.fromstring(as_svg(ORDER))
    paths = root.findall("{*}path")
    assert len(paths) == ORDER.passes
    drawn = [re.findall(r"M([\d.]+) ([\d.]+)h", path.get("d")) for path in paths]
    cells = [[(int(float(y)), int(float(x))) for x, y in squares] for squares in drawn]
    assert cells == [list(step.yields) for step in ORDER]
    for path in paths:
        times = [float(each) for each in path[0].get("keyTimes").split(";")]
        assert times[0] == 0 and times == sorted(times) and times[-1] < 1


def test_the_gif_has_a_frame_a_pass(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "order.gif"
    write_gif(ORDER, out)
    with image.open(out) as gif:
        assert gif.n_frames == 4 - 1 + 5 + 3  # (H - 1) s + W = 11
        gif.seek(10)
        last = gif.convert("RGB")
        assert last.getpixel((2, 2)) == (0x4C, 0x78, 0xA8)
        assert last.getpixel((gif.width - 2, gif.height - 2)) == (0xF5, 0x85, 0x18)
    assert [each.name for each in tmp_path.iterdir()] == ["order.gif"]


def test_a_png_holds_the_images_in_rows() -> None:
    pillow = pytest.importorskip("PIL.Image")
    colours = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for images_ in (colours, colours[:, :1]):
        with pillow.open(io.BytesIO(as_png(images_, columns=2, scale=2))) as sheet:
            assert sheet.size == (2 * (2 * 5 + 1), 2 * (2 * 4 + 1))
            shown = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(18, 22, -1).movedim(-1, 0)
        wanted = (255 * images_).round().long()
        assert torch.equal(shown[:, 0:8:2, 0:10:2], wanted[0])
        assert torch.equal(shown[:, 1:8:2, 13:22:2], wanted[1])
        assert torch.equal(shown[:, 10:18:2, 0:10:2], wanted[2])
        assert (shown[:, 8:10] == 128).all() and (shown[:, 10:, 10:] == 128).all()
    with pytest.raises(ValueError, match="must be"):
        as_png(colours[0])


def test_images_side_by_side_share_a_clock() -> None:
    png = as_png(torch.zeros(1, 1, 4, 6))
    panels = [
        Panel("raster", one_a_pass([1, 4, 7], 3), png),
        Panel("a & b", one_a_pass([1, 2, 3], 3, from_right=True), png),
    ]
    root = ElementTree.fromstring(compare_svg(panels, description="two ways"))
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["raster, 9 passes", "a & b, 5 passes"]
    paths = list(root.iter("{http://www.w3.org/2000/svg}path"))
    assert len(paths) == 9 + 5
    ends = [[float(t) for t in path[0].get("keyTimes").split(";")][-1] for path in paths]
    assert ends[:5] == ends[9:]
    assert ends[8] == pytest.approx(0.8)
    assert ends[4] == pytest.approx(0.8 * 5 / 9, abs=1e-4)
    # The third pass of the first image decides (0, 2), of the second one (0, 0), (1, 1) and (2, 2).
    assert paths[2].get("d") == "M2 0h1v1h-1z"
    assert paths[11].get("d") == "M0 0h1v1h-1zM1 1h1v1h-1zM2 2h1v1h-1z"
    sheets = ElementTree.fromstring(samples_svg([("raster", png)], description="samples"))
    assert len(list(sheets.iter("{http://www.w3.org/2000/svg}image"))) == 1
    with pytest.raises(ValueError, match="no images"):
        compare_svg([], description="nothing")
