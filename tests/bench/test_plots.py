import itertools
import re
import sys
import xml.etree.ElementTree as ET

import pytest

from tersor._lazy import MissingExtraError
from tersor.bench import plots
from tersor.bench.plots import Line, Point, plot_lines, plot_quality_vs_bytes

pytest.importorskip("matplotlib")

SVG = "{http://www.w3.org/2000/svg}"
LABELS = {"x_label": "compression (x)", "y_label": "answers right (%)", "description": 'quality & "cost"'}


def point(name, x, y, width=2.0, family="ours"):
    return Point(name, x, y, y - width, y + width, family)


CROWD = [
    point(f"method number {i}", 4 + 0.15 * (i % 3), 95 + 0.8 * (i // 3), family=f"family {i % 4}") for i in range(9)
]


def texts(svg):
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_the_picture_names_every_point_family_and_axis():
    svg = plot_quality_vs_bytes(CROWD, **LABELS)
    shown = texts(svg)
    for expected in [p.name for p in CROWD] + [p.family for p in CROWD] + ["compression (x)", "answers right (%)"]:
        assert expected in shown
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label") == 'quality & "cost"'


def test_markers_stand_where_the_numbers_say():
    # Three points on a line in data space are on a line, equally spaced, in the picture.
    svg = plot_quality_vs_bytes([point("a", 1, 10), point("b", 2, 20), point("c", 3, 30)], **LABELS)
    root = ET.fromstring(svg)
    uses = [u for group in root.iter(f"{SVG}g") for u in group.findall(f"{SVG}use") if u.get("x")]
    colour = plots._FAMILIES[0][0]
    marks = [(float(u.get("x")), float(u.get("y"))) for u in uses if f"fill: {colour}" in (u.get("style") or "")]
    (x0, y0), (x1, y1), (x2, y2) = marks[:3]
    assert x0 < x1 < x2 and y0 > y1 > y2, "more is to the right, better is up"
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.01) and y2 - y1 == pytest.approx(y1 - y0, abs=0.01)


def test_the_same_points_give_the_same_text_without_a_date():
    svg = plot_quality_vs_bytes(CROWD, **LABELS)
    assert svg == plot_quality_vs_bytes(CROWD, **LABELS)
    assert "<metadata" not in svg and not re.search(r"20\d\d-\d\d-\d\d", svg)


def test_it_fits_light_and_dark_pages_and_loads_nothing():
    svg = plot_quality_vs_bytes(CROWD, **LABELS)
    assert "currentColor" in svg and plots._INK not in svg
    assert not re.search(r"fill: ?(#fff|white|#000|black)", svg), "an opaque background or black ink"
    assert "<style" not in svg, "rules in an inline picture apply to the page around it"
    urls = set(re.findall(r"https?://[^\"'\s]+", svg))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def relative_luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [colour for colour, _ in plots._FAMILIES] + [plots._STANDALONE_INK])
def test_every_colour_has_contrast_on_both_backgrounds(colour):
    on_white = 1.05 / (relative_luminance(colour) + 0.05)
    on_dark = (relative_luminance(colour) + 0.05) / (relative_luminance("#1b1f25") + 0.05)
    assert min(on_white, on_dark) >= 3


def overlap(a, b):
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


@pytest.mark.parametrize(
    "points",
    [
        CROWD,
        [point("same place one", 4, 90), point("same place two", 4, 90), point("same place three", 4, 90)],
        [point("left edge, a rather long name", 1, 50), point("right edge, a rather long name", 9, 50)],
        [point(f"level {i}", i, 98, width=0.2) for i in range(8)],
    ],
)
def test_labels_cover_neither_each_other_nor_any_mark(points, monkeypatch):
    seen = {}

    def record(figure, axes, points):
        seen["labels"] = original(figure, axes, points)
        seen["marks"] = [box for p in points for box in plots._marks(axes, p)]
        seen["inside"] = axes.get_window_extent().extents

    original = plots.place_labels
    monkeypatch.setattr(plots, "place_labels", record)
    plot_quality_vs_bytes(points, **LABELS)
    assert len(seen["labels"]) == len(points)
    for a, b in itertools.combinations(seen["labels"], 2):
        assert overlap(a, b) < 1
    for label, mark in itertools.product(seen["labels"], seen["marks"]):
        assert overlap(label, mark) < 1
    left, bottom, right, top = seen["inside"]
    for box in seen["labels"]:
        assert left - 1 <= box[0] and box[2] <= right + 1 and bottom - 1 <= box[1] and box[3] <= top + 1


def test_the_process_keeps_its_own_plot_settings():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_quality_vs_bytes([point("a", 1, 1)], **LABELS)
    assert dict(matplotlib.rcParams) == before


def test_bad_points_are_refused():
    with pytest.raises(ValueError, match="no points"):
        plot_quality_vs_bytes([], **LABELS)
    with pytest.raises(ValueError, match="not finite"):
        Point("a", float("nan"), 1, 1, 1, "f")
    with pytest.raises(ValueError, match="low <= y <= high"):
        Point("a", 1, 2, 3, 4, "f")
    with pytest.raises(ValueError, match="9 families"):
        plot_quality_vs_bytes([point("a", i, 1, family=f"f{i}") for i in range(9)], **LABELS)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"extra bench"):
        plot_quality_vs_bytes([point("a", 1, 1)], **LABELS)


def test_lines_are_drawn_with_their_names_and_ticks_at_the_points() -> None:
    line = Line("ours", ((1024.0, 1.0, 0.9, 1.1), (4096.0, 2.0, 1.5, 2.5)))
    svg = plot_lines([line], x_label="tokens", y_label="ms", description="time", logarithmic=True)
    assert svg == plot_lines([line], x_label="tokens", y_label="ms", description="time", logarithmic=True)
    for text in ("ours", "1,024", "4,096", "tokens", 'aria-label="time"'):
        assert text in svg
    with pytest.raises(ValueError, match="no lines"):
        plot_lines([], x_label="x", y_label="y", description="d")
    with pytest.raises(ValueError, match="no points"):
        Line("empty", ())
    with pytest.raises(ValueError, match="low <= y"):
        Line("wrong", ((1.0, 1.0, 2.0, 3.0),))
