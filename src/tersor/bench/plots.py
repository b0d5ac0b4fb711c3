"""Plots of quality against cost, as SVG text that fits light and dark pages alike."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

from tersor._errors import TersorError
from tersor._lazy import require

# Mid-tones with a contrast of at least 3:1 on white and on near-black; the marker tells families apart too.
_FAMILIES = (
    *(("#2f80d0", "o"), ("#d0602f", "s"), ("#2f9a62", "D"), ("#a562c8", "^")),
    *(("#b58900", "v"), ("#c8506e", "P"), ("#5f8f9f", "X"), ("#8a7a5c", "h")),
)
# Drawn in this colour, then replaced by `currentColor`, so that axes and text take the page's own colour.
_INK = "#010203"
# What `currentColor` means where no page says so, as in an <img>: readable on white and on black.
_STANDALONE_INK = "#7d7d7d"
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be selected, read aloud, and is small
    "svg.hashsalt": "tersor",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
# Where a label may stand, as (direction right, direction up), in order of preference.
_DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
_DISTANCES = (7, 13, 22, 34, 48)
_Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels


@dataclass(frozen=True)
class Point:
    """One alternative in a plot: a cost ``x``, a quality ``y`` with its interval, and the family it is of.

    Raises `ValueError` if a number is not finite or ``low <= y <= high`` does not hold.
    """

    name: str
    x: float
    y: float
    low: float
    high: float
    family: str

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if not all(map(math.isfinite, (self.x, self.y, self.low, self.high))):
            raise TersorError(f"point {self.name!r} has a number that is not finite: {self}")
        if not self.low <= self.y <= self.high:
            raise TersorError(f"point {self.name!r} needs low <= y <= high; got {self.low}, {self.y}, {self.high}")


def plot_quality_vs_bytes(
    points: Sequence[Point], *, x_label: str, y_label: str, description: str, baseline: float | None = None
) -> str:
    """Quality over cost as SVG text: one marker with error bars per point, a colour and marker per family.

    ``description`` is what a screen reader says. ``baseline`` draws a dashed line at that quality.
    The same arguments give the same text.
    Raises `ValueError` without points, and `MissingExtraError` without matplotlib.
    """
    if not points:
        raise TersorError("there are no points to plot")
    matplotlib = require("matplotlib", "bench")
    figures = require("matplotlib.figure", "bench")
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        # 72 dots per inch, as an SVG has: label positions are counted in pixels.
        figure = figures.Figure(figsize=(7.2, 4.4), dpi=72, layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.15, color=_INK)
        axes.margins(x=0.16, y=0.14)
        if baseline is not None:
            axes.axhline(baseline, color=_INK, linewidth=1, linestyle=(0, (4, 4)), alpha=0.6)
        looks = _family_looks(points)
        for family, (colour, marker) in looks.items():
            _draw_family(axes, [point for point in points if point.family == family], family, colour, marker)
        if len(looks) > 1:
            figure.legend(loc="outside lower center", ncols=min(len(looks), 4), frameon=False)
        place_labels(figure, axes, points)
        return _as_svg(figure, description)


@dataclass(frozen=True)
class Line:
    """One alternative over a quantity that varies: points ``(x, y, low, high)`` in order of ``x``.

    Raises `ValueError` without points, or if ``low <= y <= high`` does not hold.
    """

    name: str
    points: tuple[tuple[float, float, float, float], ...]

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if not self.points:
            raise TersorError(f"line {self.name!r} has no points")
        for x, y, low, high in self.points:
            Point(self.name, x, y, low, high, self.name)


def plot_lines(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    description: str,
    logarithmic: bool = False,
    whole_x: bool = False,
) -> str:
    """Lines with error bars as SVG text; ``description`` is what a screen reader says.

    ``logarithmic``: both axes, ticks at the points. ``whole_x``: ticks at the points of a linear axis.
    Raises `ValueError` without lines, and `MissingExtraError` without matplotlib.
    """
    if not lines:
        raise TersorError("there are no lines to plot")
    if len(lines) > len(_FAMILIES):
        raise TersorError(f"got {len(lines)} lines; {len(_FAMILIES)} can be told apart in one plot")
    matplotlib = require("matplotlib", "bench")
    figures = require("matplotlib.figure", "bench")
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure = figures.Figure(figsize=(7.2, 4.4), dpi=72, layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.15, color=_INK)
        if logarithmic:
            axes.set(xscale="log", yscale="log")
        for line, (colour, marker) in zip(lines, _FAMILIES, strict=False):
            x, y, low, high = zip(*line.points, strict=True)
            below, above = ([abs(a - b) for a, b in zip(ends, y, strict=True)] for ends in (low, high))
            axes.errorbar(
                x, y, yerr=[below, above], marker=marker, color=colour, label=line.name, markersize=6, capsize=3, lw=1.6
            )
        if logarithmic or whole_x:
            ticks = sorted({point[0] for line in lines for point in line.points})
            axes.set_xticks(ticks, labels=[f"{tick:,.0f}" for tick in ticks])
            axes.minorticks_off()
        figure.legend(loc="outside lower center", ncols=min(len(lines), 3), frameon=False)
        return _as_svg(figure, description)


def place_labels(figure: Any, axes: Any, points: Sequence[Point]) -> list[_Box]:
    """Write each point's name where it covers neither marks nor other names; return the boxes in pixels.

    Greedy: points in order, and for each the nearest free place of those tried, or the least covered one.
    """
    renderer = require("matplotlib.backends.backend_agg", "bench").FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # settles the layout, which pixel positions depend on
    figure.set_layout_engine("none")
    inside = axes.get_window_extent(renderer)
    taken = [box for point in points for box in _marks(axes, point)]
    placed = []
    for point in points:
        text = axes.annotate(point.name, (point.x, point.y), xytext=(0, 0), textcoords="offset pixels")
        text.set(fontsize=9, va="bottom", ha="left", annotation_clip=False)
        extent = text.get_window_extent(renderer)
        anchor = axes.transData.transform((point.x, point.y))
        box = _best_place(anchor, (extent.width, extent.height), taken, (*inside.min, *inside.max))
        # Anchored at the side of its point: the page's font may be narrower than the one measured here.
        side, x = _nearest_edge(box, anchor[0])
        text.set_horizontalalignment(side)
        text.xyann = (x - anchor[0], box[1] - anchor[1])
        taken.append(box)
        placed.append(box)
    return placed


def _family_looks(points: Iterable[Point]) -> dict[str, tuple[str, str]]:
    families = list(dict.fromkeys(point.family for point in points))
    if len(families) > len(_FAMILIES):
        raise TersorError(f"got {len(families)} families; {len(_FAMILIES)} can be told apart in one plot")
    return dict(zip(families, _FAMILIES, strict=False))


def _draw_family(axes: Any, points: list[Point], family: str, colour: str, marker: str) -> None:
    x, y = [point.x for point in points], [point.y for point in points]
    below, above = [point.y - point.low for point in points], [point.high - point.y for point in points]
    axes.errorbar(
        x,
        y,
        yerr=[below, above],
        fmt=marker,
        color=colour,
        label=family,
        markersize=7,
        capsize=3,
        elinewidth=1.4,
    )


def _marks(axes: Any, point: Point) -> list[_Box]:
    x, y = axes.transData.transform((point.x, point.y))
    low, high = (axes.transData.transform((point.x, end))[1] for end in (point.low, point.high))
    return [(x - 6, y - 6, x + 6, y + 6), (x - 3, low, x + 3, high)]


def _best_place(anchor: Sequence[float], size: tuple[float, float], taken: list[_Box], inside: _Box) -> _Box:
    width, height = size
    best, least = (0.0, 0.0, 0.0, 0.0), math.inf
    for distance in _DISTANCES:
        for right, up in _DIRECTIONS:
            left = anchor[0] + right * distance + (right - 1) / 2 * width
            bottom = anchor[1] + up * distance * 0.6 + (up - 1) / 2 * height
            box = (left, bottom, left + width, bottom + height)
            covered = sum(_overlap(box, other) for other in taken) + width * height - _overlap(box, inside)
            if covered < least - 1e-6:
                best, least = box, covered
    return best


def _nearest_edge(box: _Box, x: float) -> tuple[str, float]:
    if box[0] >= x:
        return "left", box[0]
    return ("right", box[2]) if box[2] <= x else ("center", (box[0] + box[2]) / 2)


def _overlap(a: _Box, b: _Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _as_svg(figure: Any, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _finish(buffer.getvalue(), description)


def _finish(svg: str, description: str) -> str:
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # matplotlib's rule for all elements would leave the picture and apply to the page around it.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    # The page's own font instead of a list of matplotlib's.
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    # A fixed size in points would not shrink with the page.
    svg = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    looks = f'color="{_STANDALONE_INK}" font-family="system-ui, sans-serif" stroke-linejoin="round"'
    return svg.replace("<svg", f'<svg role="img" aria-label={quoteattr(description)} {looks}', 1)
