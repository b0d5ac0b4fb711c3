"""`tersor images`, and the pictures that it draws."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from typer.testing import CliRunner

from tersor._lazy import MissingExtraError
from tersor.grids.cli import images
from tersor.grids.drawing import as_svg
from tersor.grids.geometry import RasterGrid
from tersor.grids.schedule import ZipARSchedule

GRID = ["schedule", "--grid", "90x90", "--window", "7"]


def run(*arguments: str):
    return CliRunner().invoke(images, [*arguments], catch_exceptions=False)


def test_the_schedule_counts_passes() -> None:
    facts = json.loads(run(*GRID, "--json").output)
    assert (facts["passes"], facts["raster_passes"], facts["window"]) == (713, 8190, 7)
    assert facts["reduction"] == pytest.approx(0.913, abs=1e-3)
    assert facts["row_start_pass"][:3] == [1, 8, 15]
    text = run(*GRID).output
    assert "713 forward passes instead of 8,190: 91.3% fewer, 11.36 tokens a pass" in text
    facts = json.loads(
        run("schedule", "--grid", "24X24", "--window", "quality", "--row-start", "auto", "--json").output
    )
    assert (facts["row_start"], facts["window"], facts["passes"]) == ("conservative", 16, 48 + 22 * 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "90"], "90x90"),
        (["--grid", "0x4"], "90x90"),
        (["--grid", "4x-1"], "90x90"),
        (["--grid", "99999x99999"], "at most"),
        (["--window", "0"], "whole number"),
        (["--window", "-3"], "whole number"),
        (["--window", "wide"], "unknown"),
        (["--row-start", "never"], "must be one of"),
        (["--out", "order.png"], ".svg or .gif"),
    ],
)
def test_bad_input(arguments, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run("schedule", *arguments)


def test_the_svg_lights_every_cell_up_in_its_pass(tmp_path) -> None:
    out = tmp_path / "deep" / "order.svg"
    run("schedule", "--grid", "4x5", "--window", "2", "--out", str(out))
    text = out.read_text(encoding="utf-8")
    order = ZipARSchedule(RasterGrid(4, 5, end_of_row=True), 2, "eol")
    assert text == as_svg(order)
    root = ElementTree.fromstring(text)
    paths = root.findall("{*}path")
    assert len(paths) == order.passes
    drawn = [re.findall(r"M([\d.]+) ([\d.]+)h", path.get("d")) for path in paths]
    cells = [[(int(float(y)), int(float(x))) for x, y in squares] for squares in drawn]
    assert cells == [list(step.yields) for step in order]
    for path in paths:
        times = [float(each) for each in path[0].get("keyTimes").split(";")]
        assert times[0] == 0 and times == sorted(times) and times[-1] < 1


def test_the_gif_has_a_frame_a_pass(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "order.gif"
    run("schedule", "--grid", "4x5", "--window", "2", "--out", str(out))
    with image.open(out) as gif:
        assert gif.n_frames == 4 - 1 + 5 + 3  # (H - 1) s + W = 11
        gif.seek(10)
        last = gif.convert("RGB")
        assert last.getpixel((2, 2)) == (0x4C, 0x78, 0xA8)
        assert last.getpixel((gif.width - 2, gif.height - 2)) == (0xF5, 0x85, 0x18)
    assert [each.name for each in tmp_path.iterdir()] == ["order.gif"]


def test_a_gif_without_pillow_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tersor\[images\]'"):
        run("schedule", "--grid", "4x5", "--out", str(tmp_path / "order.gif"))


def test_the_schedule_loads_no_torch() -> None:
    import subprocess

    code = "import sys, tersor.grids.schedule, tersor.grids.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
