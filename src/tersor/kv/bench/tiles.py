"""Questions about a grid of tiles, for vision-language models: it is known which cells matter, and in which order.

A picture is a grid of cells of grey noise, a cell one visual token of tiny-vlm. A few cells are tiles: their upper half
has one colour, the key, their lower half another, the value. The keys of a picture differ, and the value of every tile
is the key of another, so that each tile points to the next:

- ``look K``: the value of tile A, whose key is K;
- ``chain K``: the value of tile B, whose key is A's value;
- ``trail K``: the same once more.

Words without a meaning stand between the colour and the question mark, as a question's sentence does in a real prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    "cyan": (40, 210, 220),
    "black": (15, 15, 15),
}
#: Kinds of questions, and how many tiles lead to the answer.
STEPS = {"look": 1, "chain": 2, "trail": 3}
KINDS = tuple(STEPS)
#: Layers in which tiny-vlm was taught to read the cells of these steps, see its card.
READ_IN = (3, 5, 7)
CELL = 8  # pixels
GRID, TILES, FILLERS = 32, 8, 66
_TEXT = (
    "before you say anything take a moment and go over the whole picture from its upper left corner down to its lower "
    "right one for among so many grey cells there are but a few with two halves and each of them names another by its "
    "lower half so follow them one after the other as often as you were told and then give us just that single word "
    "which stands at the end"
)
#: What the words between the colour and the question mark are taken from, in a circle.
FILLER = tuple(_TEXT.split())
_NAMES = tuple(COLOURS)

Cell = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """One tile: its cell (row, column) and the names of its two colours."""

    cell: Cell
    key: str
    value: str


@dataclass(frozen=True)
class Question:
    """A question as the model reads it.

    Args:
        kind: One of `KINDS`.
        colour: The key that it starts from.
        text: All of its words.
        answer: The one word that is right.
        steps: The cell that each step reads, in order; a step may come back to an earlier cell.
    """

    kind: str
    colour: str
    text: str
    answer: str
    steps: tuple[Cell, ...]


@dataclass(frozen=True)
class Picture:
    """Tiles on a ``grid`` of noise, which is a function of the seed ``noise``."""

    grid: int
    tiles: tuple[Tile, ...]
    noise: int

    @property
    def pixels(self) -> np.ndarray:
        """uint8 ``[8 grid, 8 grid, 3]``, drawn anew at each call."""
        side = self.grid * CELL
        grey = np.random.default_rng(self.noise).integers(96, 160, (side, side, 1), dtype=np.uint8)
        pixels = np.repeat(grey, 3, axis=2)
        for tile in self.tiles:
            top, left = CELL * tile.cell[0], CELL * tile.cell[1]
            pixels[top : top + CELL // 2, left : left + CELL] = COLOURS[tile.key]
            pixels[top + CELL // 2 : top + CELL, left : left + CELL] = COLOURS[tile.value]
        return pixels

    def path(self, kind: str, colour: str) -> tuple[Tile, ...]:
        """The tiles that the question reads, in order.

        Raises:
            ValueError: If the picture has no tile for one of the steps.
        """
        found: list[Tile] = []
        for _ in range(STEPS[kind]):
            wanted = found[-1].value if found else colour
            tile = next((each for each in self.tiles if each.key == wanted), None)
            if tile is None:
                raise TersorError(f"'{kind} {colour}' needs a tile whose upper half is {wanted}; the picture has none")
            found.append(tile)
        return tuple(found)

    def ask(self, kind: str, colour: str, *, fillers: int = FILLERS, start: int = 0) -> Question:
        """The question ``kind`` about ``colour``, with ``fillers`` words of `FILLER` from word ``start`` on.

        Raises:
            ValueError: If the picture does not answer it.
        """
        path = self.path(kind, colour)
        words = [FILLER[(start + index) % len(FILLER)] for index in range(fillers)]
        text = " ".join([kind, colour, *words, "?"])
        return Question(kind, colour, text, path[-1].value, tuple(tile.cell for tile in path))


def picture(rng: np.random.Generator, *, grid: int = GRID, tiles: int = TILES, closed: bool = True) -> Picture:
    """A random picture.

    Args:
        rng: What it is drawn from.
        grid: Cells on a side.
        tiles: How many of them are tiles, each with another key.
        closed: Whether every value is the key of another tile; otherwise values are drawn from all colours.

    Raises:
        ValueError: If there are more tiles than cells or colours, or a single one that should point to another.
    """
    most, least = min(grid * grid, len(_NAMES)), 2 if closed else 1
    if not least <= tiles <= most:
        raise TersorError(f"tiles={tiles} must be between {least} and {most} on a grid of {grid} x {grid}")
    cells = rng.choice(grid * grid, tiles, replace=False).tolist()
    keys = [_NAMES[index] for index in rng.permutation(len(_NAMES))[:tiles]]
    if closed:
        values = [keys[(index + int(rng.integers(1, tiles))) % tiles] for index in range(tiles)]
    else:
        values = [_NAMES[index] for index in rng.integers(0, len(_NAMES), tiles)]
    placed = [Tile(divmod(cell, grid), key, value) for cell, key, value in zip(cells, keys, values, strict=True)]
    return Picture(grid, tuple(placed), int(rng.integers(2**32)))


def samples(
    n: int,
    *,
    seed: int,
    kinds: Sequence[str] = KINDS,
    grid: int = GRID,
    tiles: int = TILES,
    fillers: int = FILLERS,
) -> list[tuple[Picture, Question]]:
    """``n`` pictures for each of ``kinds``, one kind after the other, with one question each.

    Args:
        n: How many of each kind; fewer are the first ones of more.
        seed: Seed of everything that is drawn.
        kinds: Kinds of questions, of `KINDS`.
        grid: Cells on a side; a cell is one visual token.
        tiles: How many of them are tiles.
        fillers: Words between the colour and the question mark.

    Raises:
        ValueError: For an unknown kind, or tiles that do not fit.
    """
    check_kinds(kinds)
    made = []
    for kind in kinds:
        rng = np.random.default_rng([seed, KINDS.index(kind), grid, tiles])
        for _ in range(n):
            shown = picture(rng, grid=grid, tiles=tiles)
            colour = shown.tiles[int(rng.integers(tiles))].key
            made.append((shown, shown.ask(kind, colour, fillers=fillers, start=int(rng.integers(len(FILLER))))))
    return made


def check_kinds(kinds: Iterable[str]) -> None:
    """Raises `ValueError` for a kind that there is not."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise TersorError(f"kind {unknown[0]!r} must be one of {KINDS}")
