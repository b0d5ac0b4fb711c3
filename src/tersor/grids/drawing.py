"""The decoding order as a moving picture, an animated SVG written here or a GIF; and images as a PNG."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from tersor._atomic import write_bytes
from tersor._errors import TersorError
from tersor._images import gif_bytes
from tersor._lazy import require
from tersor.grids.schedule import ZipARSchedule

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_OPEN, _DECIDED, _NEW = "#d8dce3", "#4c78a8", "#f58518"
#: A whole animation takes this long, whatever the number of passes, and its last picture stays for a fifth of it.
_SECONDS = 8.0
_HOLD = 0.2
# Of pictures side by side: the width of each, what is between two, and the line of their titles.
_SIDE, _GAP, _HEAD = 20.0, 2.0, 2.8


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


@dataclass(frozen=True)
class Panel:
    """One image of `compare_svg`.

    Args:
        title: Stands above it.
        decided: The pass that decides each cell, by row.
        png: The finished image.
    """

    title: str
    decided: Sequence[Sequence[int]]
    png: bytes

    @property
    def passes(self) -> int:
        """Passes of the whole image."""
        return max(map(max, self.decided))


def one_a_pass(starts: Sequence[int], columns: int, *, from_right: bool = False) -> list[list[int]]:
    """`Panel.decided` of rows that each take one pass a token.

    Args:
        starts: The pass that decides each row's first token.
        columns: Columns of the grid.
        from_right: A row is decided from its last token to its first.
    """
    order = [*range(columns)]
    return [[start + step for step in (order[::-1] if from_right else order)] for start in starts]


def compare_svg(panels: Sequence[Panel], *, description: str) -> str:
    """Images side by side, each uncovered token by token; all on one clock, so that the quicker one is done first.

    Viewers without animation show the finished images. Raises `ValueError` without panels.
    """
    share = (1 - _HOLD) / max((panel.passes for panel in panels), default=1)
    drawn = []
    for panel in panels:
        rows, columns = len(panel.decided), len(panel.decided[0])
        scale = _SIDE / max(rows, columns)
        lines = [
            f'<g transform="scale({scale:.5g})">',
            f'<image width="{columns}" height="{rows}" {_embedded(panel.png)}/>',
        ]
        squares: dict[int, list[str]] = {number: [] for number in range(1, panel.passes + 1)}
        for row, passes in enumerate(panel.decided):
            for column, number in enumerate(passes):
                squares[number].append(f"M{column} {row}h1v1h-1z")
        for number, cells in squares.items():
            times = f"0;{(number - 1) * share:.5g};{number * share:.5g}"
            lines.append(
                f'<path d="{"".join(cells)}" fill="none"><animate attributeName="fill" values="{_OPEN};{_NEW};none" '
                f'keyTimes="{times}" dur="{_SECONDS:g}s" calcMode="discrete" repeatCount="indefinite"/></path>'
            )
        drawn.append((f"{panel.title}, {panel.passes} passes", "\n".join([*lines, "</g>"])))
    return _side_by_side(drawn, _SIDE, description)


def samples_svg(sheets: Sequence[tuple[str, bytes]], *, description: str) -> str:
    """Sheets of samples side by side: title and PNG of each. Raises `ValueError` without sheets."""
    drawn = [(title, f'<image width="{_SIDE:g}" height="{_SIDE:g}" {_embedded(png)}/>') for title, png in sheets]
    return _side_by_side(drawn, _SIDE / 2, description)


def _side_by_side(drawn: Sequence[tuple[str, str]], height: float, description: str) -> str:
    """Titles with what is drawn below them, a square wide each; ``height`` of the drawings."""
    if not drawn:
        raise TersorError("there are no images to draw")
    width = len(drawn) * (_SIDE + _GAP) - _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height + _HEAD:g}" role="img" '
        'font-family="system-ui, sans-serif" font-size="1.3" color="#7d7d7d">',
        f"<title>{escape(description)}</title>",
    ]
    for index, (title, content) in enumerate(drawn):
        parts.append(
            f'<g transform="translate({index * (_SIDE + _GAP):g} 0)"><text y="1.6" fill="currentColor">{escape(title)}'
            f'</text><g transform="translate(0 {_HEAD:g})">\n{content}\n</g></g>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _embedded(png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'preserveAspectRatio="xMinYMin" style="image-rendering:pixelated" href="data:image/png;base64,{data}"'


def as_png(images: Tensor, *, columns: int | None = None, scale: int = 1) -> bytes:
    """Images ``[n, 1 or 3, height, width]`` from 0 to 1 as one PNG.

    Args:
        columns: Images in a row; as many as make the sheet about square if left out. Between them lies one grey pixel.
        scale: Pixels a side that each pixel becomes.

    Raises:
        ValueError: If there is another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise TersorError(f"images must be [n, 1 or 3, height, width]; got {tuple(images.shape)}")
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    sheet = images.new_full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 0.5)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    sheet = sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    pixels = (sheet.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()
    # Filter 0, none, before every line.
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def write_gif(schedule: ZipARSchedule, path: Path) -> None:
    """A frame a pass, at ``path``; the old file stays until the new one is whole.

    Raises:
        MissingExtraError: Without pillow, naming the extra that brings it.
    """
    images = require("PIL.Image", "images")
    frames = [*_frames(schedule, images)]
    # GIF counts in hundredths of a second, and viewers slow down what is faster than two.
    duration = max(20, round(1000 * _SECONDS * (1 - _HOLD) / schedule.passes))
    durations = [duration] * (len(frames) - 1) + [round(1000 * _SECONDS * _HOLD)]
    write_bytes(path, gif_bytes(frames, durations))


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
