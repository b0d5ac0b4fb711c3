"""Questions about a grid of tiles, for vision-language models: which cells matter is known for every question.

A picture is a grid of cells of grey noise. A few cells are tiles: their upper half has one colour, the key, their
lower half another, the value. ``color K`` asks for the value of the only tile whose key is K, ``count K`` for the
number of tiles whose key is K. A cell is one visual token of tiny-vlm-small, so nearly all of a picture is redundant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tersor._errors import TersorError

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 50),
    "purple": (150, 50, 190),
    "orange": (240, 140, 30),
}
KINDS = ("color", "count")
MOST_COUNTED = 4
CELL = 8  # pixels
_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Tile:
    """One tile: its cell (row, column) and the names of its two colours."""

    cell: tuple[int, int]
    key: str
    value: str


@dataclass(frozen=True)
class Question:
    """``text`` as the model reads it, its one-word answer, and the cells that it is about."""

    kind: str
    text: str
    answer: str
    relevant: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Picture:
    """``pixels``: uint8 ``[8 grid, 8 grid, 3]``."""

    pixels: np.ndarray
    tiles: tuple[Tile, ...]

    def keyed(self, colour: str) -> tuple[Tile, ...]:
        """The tiles whose key is ``colour``."""
        return tuple(tile for tile in self.tiles if tile.key == colour)

    def ask(self, kind: str, colour: str) -> Question:
        """The question ``kind`` about ``colour``; raises `ValueError` where it has no single answer."""
        found = self.keyed(colour)
        if kind == "color" and len(found) != 1:
            raise TersorError(f"'color {colour}' needs exactly one such tile, the picture has {len(found)}")
        if kind == "count" and len(found) > MOST_COUNTED:
            raise TersorError(f"'count {colour}': {len(found)} tiles are more than the {MOST_COUNTED} that have a word")
        answer = found[0].value if kind == "color" else str(len(found))
        return Question(kind, f"{kind} {colour}", answer, tuple(tile.cell for tile in found))

    def colours(self, kind: str) -> list[str]:
        """The colours that ``kind`` can ask about."""
        if kind == "color":
            return [name for name in _NAMES if len(self.keyed(name)) == 1]
        return [name for name in _NAMES if len(self.keyed(name)) <= MOST_COUNTED]


def picture(rng: np.random.Generator, *, grid: int = 16, tiles: int = 4) -> Picture:
    """A random picture; one colour is the key of 0 to ``MOST_COUNTED`` tiles with equal chance.

    Raises:
        ValueError: If there are more tiles than cells.
    """
    if not 1 <= tiles <= grid * grid:
        raise TersorError(f"tiles={tiles} must be between 1 and the {grid * grid} cells of the grid")
    pixels = np.repeat(rng.integers(96, 160, (grid * CELL, grid * CELL, 1), dtype=np.uint8), 3, axis=2)
    cells = rng.choice(grid * grid, tiles, replace=False)
    names = rng.permutation(_NAMES)
    repeated = int(rng.integers(0, min(MOST_COUNTED, tiles) + 1))
    keys = [names[0]] * repeated + [names[1 + i % (len(names) - 1)] for i in range(tiles - repeated)]
    placed = []
    for cell, key in zip(cells, keys, strict=True):
        row, column = divmod(int(cell), grid)
        value = str(rng.choice(_NAMES))
        top, left, middle = row * CELL, column * CELL, row * CELL + CELL // 2
        pixels[top:middle, left : left + CELL] = COLOURS[str(key)]
        pixels[middle : top + CELL, left : left + CELL] = COLOURS[value]
        placed.append(Tile((row, column), str(key), value))
    return Picture(pixels, tuple(placed))


def samples(n: int, *, kind: str, seed: int, grid: int = 16, tiles: int = 4) -> list[tuple[Picture, Question]]:
    """``n`` pictures with one question each; counting draws each answer with equal chance.

    Raises:
        ValueError: For an unknown kind.
    """
    if kind not in KINDS:
        raise TersorError(f"kind {kind!r} must be one of {KINDS}")
    rng = np.random.default_rng([seed, KINDS.index(kind), grid, tiles])
    made: list[tuple[Picture, Question]] = []
    while len(made) < n:
        answer = int(rng.integers(0, min(MOST_COUNTED, tiles) + 1))
        able: list[str] = []
        while not able:
            shown = picture(rng, grid=grid, tiles=tiles)
            able = shown.colours(kind)
            if kind == "count":
                able = [name for name in able if len(shown.keyed(name)) == answer]
        made.append((shown, shown.ask(kind, str(rng.choice(able)))))
    return made
