"""The decoding order as a moving picture: an animated SVG, written here, or a GIF."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._lazy import require
from tersor.grids.schedule import ZipARSchedule

if TYPE_CHECKING:
    from PIL.Image import Image

_OPEN, _DECIDED, _NEW = "#d8dce3", "#4c78a8", "#f58518"
#: A whole animation takes this long, whatever the number of passes, and its last picture stays for a fifth of it.
_SECONDS = 8.0
_HOLD = 0.2


def as_svg(schedule: ZipARSchedule) -> str:
    """One square a cell; it lights up in its pass. Viewers without animation show the finished grid."""
    grid = schedule.grid
    title = f"{grid.rows} by {grid.columns} tokens in {schedule.passes} passes, window {schedule.window}"
    size = f"{grid.columns} {grid.rows}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" shape-rendering="crispEdges" role="img">',
        f"<title>{title}</title>",
        f'<rect width="{grid.columns}" height="{grid.rows}" fill="{_OPEN}"/>',
    ]
    share = (1 - _HOLD) / schedule.passes
    for number, cells in enumerate(_new_cells(schedule)):
        squares = "".join(f"M{column + 0.05:g} {row + 0.05:g}h.9v.9h-.9z" for row, column in cells)
        times = f"0;{number * share:.5g};{(number + 1) * share:.5g}"
        parts.append(
            f'<path d="{squares}" fill="{_DECIDED}"><animate attributeName="fill" values="{_OPEN};{_NEW};{_DECIDED}" '
            f'keyTimes="{times}" dur="{_SECONDS:g}s" calcMode="discrete" repeatCount="indefinite"/></path>'
        )
    return "\n".join([*parts, "</svg>\n"])


def write_gif(schedule: ZipARSchedule, path: Path) -> None:
    """A frame a pass, at ``path``; the old file stays until the new one is whole.

    Raises:
        MissingExtraError: without pillow, naming the extra that brings it.
    """
    images = require("PIL.Image", "images")
    first, *rest = _frames(schedule, images)
    # GIF counts in hundredths of a second, and viewers slow down what is faster than two.
    duration = max(20, round(1000 * _SECONDS * (1 - _HOLD) / schedule.passes))
    durations = [duration] * len(rest) + [round(1000 * _SECONDS * _HOLD)]
    partial = path.with_name(f".{path.name}.tmp")
    try:
        first.save(partial, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _frames(schedule: ZipARSchedule, images: Any) -> Iterator[Image]:
    grid = schedule.grid
    scale = max(1, 360 // max(grid.rows, grid.columns))
    picture = images.new("P", (grid.columns, grid.rows), 0)
    picture.putpalette([int(color[i : i + 2], 16) for color in (_OPEN, _DECIDED, _NEW) for i in (1, 3, 5)])
    for cells in _new_cells(schedule):
        for row, column in cells:
            picture.putpixel((column, row), 2)
        yield picture.resize((grid.columns * scale, grid.rows * scale), images.Resampling.NEAREST)
        for row, column in cells:
            picture.putpixel((column, row), 1)


def _new_cells(schedule: ZipARSchedule) -> Iterator[tuple[tuple[int, int], ...]]:
    return (step.yields for step in schedule)
