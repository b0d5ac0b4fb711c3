"""Where the tokens of a grid stand in the sequence, and what each of them waits for. Pure Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from tersor._errors import TersorError

Cell = tuple[int, int]


@dataclass(frozen=True)
class RasterGrid:
    """An image of ``rows`` times ``columns`` tokens in raster order, one token a cell.

    Args:
        rows: Rows of tokens, not of pixels.
        columns: Columns of tokens.
        end_of_row: Whether a fixed token closes every row (Emu3, Lumina-mGPT).

    Raises:
        ValueError: If an axis is no whole number of at least 1.
    """

    rows: int
    columns: int
    end_of_row: bool = False

    def __post_init__(self) -> None:
        check_sizes((self.rows, self.columns))

    @property
    def stride(self) -> int:
        """Positions from one row to the next, ρ in the paper's terms."""
        return self.columns + self.end_of_row

    @property
    def length(self) -> int:
        """Positions that the whole image takes, the last end-of-row token included."""
        return self.rows * self.stride

    def offset(self, row: int, column: int) -> int:
        """Position of a cell, counted from the first token after the prefix; ``column == columns`` is the row's end."""
        return row * self.stride + column

    def feeder(self, row: int, column: int) -> int:
        """Offset of the token whose forward yields the distribution of a cell; -1 is the prefix's last token."""
        return self.offset(row, column) - 1

    def ready(self, row: int, column: int, window: int, decided: Sequence[int]) -> bool:
        """The paper's C(r, c): the ``window`` cells of the row above, from the same column on, are decided.

        Args:
            row: Of the cell.
            column: Of the cell.
            window: Cells of the row above, from the same column on.
            decided: How many tokens of each row are decided; a row is always decided from its left end.
        """
        return row == 0 or decided[row - 1] >= min(column + window, self.columns)

    def cells(self) -> Iterator[Cell]:
        """Every cell in raster order."""
        return ((row, column) for row in range(self.rows) for column in range(self.columns))


def check_sizes(sizes: Sequence[int]) -> None:
    """Raise `ValueError` unless every axis is a whole number of at least 1."""
    if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes):
        raise TersorError(f"grid {tuple(sizes)} must have axes of at least 1 token each, such as (24, 24)")


def fronts(sizes: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """The cells of a grid by their distance from the first one, each front in raster order.

    Args:
        sizes: ``(rows, columns)`` of an image, or ``(frames, rows, columns)`` of a video.

    Returns:
        Front d holds the cells whose coordinates sum to d. NAR decodes one front a pass.

    Example:
        >>> fronts((2, 2))
        [[(0, 0)], [(0, 1), (1, 0)], [(1, 1)]]
    """
    check_sizes(sizes)
    found: list[list[tuple[int, ...]]] = [[] for _ in range(front_count(sizes))]
    for cell in product(*map(range, sizes)):
        found[sum(cell)].append(cell)
    return found


def raster_place(cell: Sequence[int], sizes: Sequence[int]) -> int:
    """How many cells of a grid without ends of rows come before ``cell`` in raster order."""
    place = 0
    for coordinate, size in zip(cell, sizes, strict=True):
        place = place * size + coordinate
    return place


def front_count(sizes: Sequence[int]) -> int:
    """Number of fronts, which is NAR's number of forward passes: the axes' sum, less their number, plus 1."""
    check_sizes(sizes)
    return sum(sizes) - len(sizes) + 1
