"""The tiles of a picture as its pixels have them."""

from __future__ import annotations

import numpy as np

from tersor.kv.bench.tiles import CELL, COLOURS


def halves(pixels: np.ndarray, row: int, column: int) -> tuple[str | None, str | None]:
    """The colours of a cell as the pixels have them, None for noise."""
    cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    names = {rgb: name for name, rgb in COLOURS.items()}
    found = [
        {tuple(map(int, pixel)) for pixel in half.reshape(-1, 3)} for half in (cell[: CELL // 2], cell[CELL // 2 :])
    ]
    top, bottom = (names.get(next(iter(colours))) if len(colours) == 1 else None for colours in found)
    return top, bottom
