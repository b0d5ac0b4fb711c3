"""Which tokens a sparse prefill kept, drawn over the picture, a panel a layer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from tersor._errors import TersorError

_SIDE = 8  # of a cell, in the units of the drawing
_GAP, _LABEL = 12, 14
_DROPPED = "#11131a"


def kept_cells(columns: Sequence[int], *, first: int, rows: int, width: int) -> np.ndarray:
    """Kept cells, bool ``[rows, width]``, of kept input ``columns``; the picture starts at column ``first``."""
    flat = np.zeros(rows * width, dtype=bool)
    inside = np.asarray(columns, dtype=np.int64) - first
    flat[inside[(inside >= 0) & (inside < rows * width)]] = True
    return flat.reshape(rows, width)


def heatmap(
    pixels: np.ndarray,
    kept: Sequence[np.ndarray],
    labels: Sequence[str],
    *,
    description: str,
    relevant: Sequence[tuple[int, int]] = (),
) -> str:
    """SVG: the picture, then each layer's view of it, where what was left out is dark.

    Args:
        pixels: uint8 ``[height, width, 3]``; every cell is drawn in the mean colours of its upper and lower half.
        kept: bool ``[rows, columns]`` for each panel. labels: under each panel.
        description: what a screen reader says. relevant: cells (row, column) to outline.

    Raises:
        ValueError: If the picture does not divide into the cells, or labels and panels differ in number.
    """
    if len(kept) != len(labels) or not kept:
        raise TersorError(f"got {len(kept)} panels and {len(labels)} labels; give one label for each of at least one")
    rows, columns = kept[0].shape
    height, width, _ = pixels.shape
    if height % (2 * rows) or width % columns:
        raise TersorError(f"a picture of {height} x {width} pixels does not divide into {rows} x {columns} cells")
    halves = pixels.reshape(2 * rows, height // (2 * rows), columns, width // columns, 3).mean((1, 3)).astype(int)
    picture = "".join(
        f'<rect x="{column * _SIDE}" y="{row * _SIDE / 2:g}" width="{_SIDE}" height="{_SIDE / 2:g}" '
        f'fill="#{red:02x}{green:02x}{blue:02x}"/>'
        for row, line in enumerate(halves)
        for column, (red, green, blue) in enumerate(line)
    )
    outline = "".join(
        f'<rect x="{column * _SIDE}" y="{row * _SIDE}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#fff" '
        'stroke-width="1.2"/>'
        for row, column in relevant
    )
    panels = [("the picture", ""), *((label, _shade(own)) for label, own in zip(labels, kept, strict=True))]
    step = columns * _SIDE + _GAP
    size = f"{len(panels) * step - _GAP} {rows * _SIDE + _LABEL}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" shape-rendering="crispEdges" role="img" '
        f'aria-label="{escape(description)}">',
        f'<defs><g id="tiles">{picture}</g></defs>',
    ]
    for index, (label, shade) in enumerate(panels):
        parts.append(
            f'<g transform="translate({index * step} 0)"><use href="#tiles"/>{shade}{outline}'
            f'<text x="0" y="{rows * _SIDE + _LABEL - 4}" font-size="9" font-family="sans-serif" fill="#888">'
            f"{escape(label)}</text></g>"
        )
    return "\n".join([*parts, "</svg>\n"])


def _shade(kept: np.ndarray) -> str:
    """One path over all cells that were left out."""
    squares = "".join(
        f"M{column * _SIDE} {row * _SIDE}h{_SIDE}v{_SIDE}h-{_SIDE}z" for row, column in np.argwhere(~kept)
    )
    return f'<path d="{squares}" fill="{_DROPPED}" fill-opacity=".82"/>'
