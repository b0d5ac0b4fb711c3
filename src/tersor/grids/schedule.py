"""Which tokens go into each forward pass, and which cells come out of it. Pure Python.

Every decoder of grids runs the steps of a `Schedule`: `RasterSchedule` is one cell a pass, `ZipARSchedule` a fixed
window, `NARSchedule` one front a pass. `Frontier` builds ZipAR's passes one at a time, so that a decoder can delay a
row (the adaptive window).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, Protocol, get_args

from tersor._errors import TersorError
from tersor.grids.geometry import Cell, RasterGrid, check_sizes, front_count, fronts, raster_place

RowStart = Literal["eol", "conservative", "eager"]
ROW_STARTS: tuple[str, ...] = get_args(RowStart)
#: Share of the columns, as numerator and denominator.
PRESETS = {"quality": (2, 3), "balanced": (1, 2), "fast": (1, 4)}


@dataclass(frozen=True)
class Step:
    """One forward pass in numbers, as decoders read it.

    A place counts the tokens of an image, ends of rows included, from the first one after the prefix.

    Args:
        cells: What comes out, by coordinates.
        targets: The places of these cells.
        fed: Places of the tokens that go in. The first pass feeds the prefix instead, and has none.
        sources: For each of them the place of the decided token that is fed: its own, or that of a token that stands
            in for it.
        keep: Which of the fed tokens, counted from 0, the logits are read from.
    """

    cells: tuple[tuple[int, ...], ...]
    targets: tuple[int, ...]
    fed: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()


class Schedule(Protocol):
    """An order of decoding; a new one is one more class with this method.

    A step may decide any set of cells, learned, random or fixed, and feed any tokens that were decided before, also
    again. Two rules are all: each cell comes out once, and steps come in the order in which they are run. What a
    token sees, and how its logits become those of a cell, is up to the reader that the decoder runs
    (`tersor.grids.decoding`): a raster model's token gives the cell after it, NAR's heads give all neighbours.
    """

    def steps(self) -> Iterator[Step]:
        """The forward passes; the first one is the prefix's."""


def group_steps(groups: Iterable[Sequence[tuple[int, ...]]], sizes: Sequence[int]) -> Iterator[Step]:
    """Steps that each decide one group of cells, and feed the group before.

    Args:
        groups: Coordinates of the cells that come out, pass by pass.
        sizes: Axes of the grid, which has no ends of rows.
    """
    before: tuple[int, ...] = ()
    for group in groups:
        targets = tuple(raster_place(cell, sizes) for cell in group)
        yield Step(tuple(group), targets, before, before, tuple(range(len(before))))
        before = targets


@dataclass(frozen=True)
class RasterSchedule:
    """One cell a pass, in raster order.

    Args:
        sizes: Axes of the grid, such as ``(rows, columns)``.

    Raises:
        ValueError: If an axis is no whole number of at least 1.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        check_sizes(self.sizes)

    def steps(self) -> Iterator[Step]:
        """See `Schedule`."""
        return group_steps(((cell,) for cell in product(*map(range, self.sizes))), self.sizes)


@dataclass(frozen=True)
class Feed:
    """One token of a forward pass.

    Args:
        offset: Its position, counted from the first token after the prefix.
        source: The decided cell whose token is fed, or None for the end-of-row token. It lies elsewhere than at
            ``offset`` for a proxy, which stands in for a row's last token before that is decided.
        yields: The cell that the token's logits give, or None if only its keys and values are wanted.
    """

    offset: int
    source: Cell | None
    yields: Cell | None = None


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Args:
        feeds: Tokens in increasing position. The first pass feeds the prefix, and has none.
        yields: Cells that come out, by row.
        trial: The one of them that is drawn but not decided yet: a row start of the adaptive window.
        replaced: Offsets that an earlier pass fed too; what it left in the cache becomes invalid with this pass.
    """

    feeds: tuple[Feed, ...]
    yields: tuple[Cell, ...]
    trial: Cell | None = None
    replaced: tuple[int, ...] = ()

    def step(self, grid: RasterGrid) -> Step:
        """The same in places of ``grid``; ends of rows lie at theirs from the start."""
        return Step(
            self.yields,
            tuple(grid.offset(*cell) for cell in self.yields),
            tuple(feed.offset for feed in self.feeds),
            tuple(feed.offset if feed.source is None else grid.offset(*feed.source) for feed in self.feeds),
            tuple(index for index, feed in enumerate(self.feeds) if feed.yields is not None),
        )


class Frontier:
    """Decides, pass by pass, what to feed; the state is how many tokens of each row are decided.

    Args:
        grid: The image.
        window: The paper's s, in cells; from 1 to the number of columns, which is raster decoding.
        row_start: ``"eol"`` feeds the end-of-row token. Without one, a row's first token needs the last token of the
            row above, and a proxy stands in for it: ``"conservative"`` has row 1 wait for the whole of row 0 (the
            authors' LlamaGen code), ``"eager"`` lets it start like the others.
        adaptive: A row's first token is a trial until the decoder accepts it.

    Raises:
        ValueError: If the grid does not have the window or the row start.
    """

    def __init__(self, grid: RasterGrid, window: int, row_start: RowStart, *, adaptive: bool = False) -> None:
        check_window(window, grid.columns)
        check_row_start(row_start, grid)
        self.grid, self.window, self.row_start, self.adaptive = grid, window, row_start, adaptive
        self.decided = [0] * grid.rows
        self._fed: set[int] = set()
        self._last: Pass | None = None

    def ready(self, row: int, column: int) -> bool:
        """The paper's C(r, c); in conservative mode row 1 also waits for the whole of row 0."""
        if self.row_start == "conservative" and row == 1 and column == 0 and self.decided[0] < self.grid.columns:
            return False
        return self.grid.ready(row, column, self.window, self.decided)

    def advance(self, *, accepted: bool = False) -> Pass | None:
        """Take the last pass's cells as decided and build the next pass; None when the image is complete.

        Args:
            accepted: Whether the last pass's trial is decided; without one it means nothing.
        """
        if self._last is None:
            self._last = Pass(feeds=(), yields=((0, 0),))
            return self._last
        completed = self._commit(self._last, accepted)
        if self.decided[-1] == self.grid.columns:
            return None
        feeds = {feed.offset: feed for feed in self._flush(completed)}
        for row, count in enumerate(self.decided):
            if 0 < count < self.grid.columns and self.ready(row, count):
                feeds[self.grid.feeder(row, count)] = Feed(self.grid.feeder(row, count), (row, count - 1), (row, count))
        trial = None
        if (start := self._row_start()) is not None and start.yields is not None:
            # Without an end-of-row token, a complete row's last token is flush and feeder in one.
            feeds[start.offset] = start
            if self.adaptive and self.decided[start.yields[0] - 1] < self.grid.columns:
                trial = start.yields
        ordered = tuple(feeds[offset] for offset in sorted(feeds))
        self._last = Pass(
            feeds=ordered,
            yields=tuple(feed.yields for feed in ordered if feed.yields is not None),
            trial=trial,
            replaced=tuple(offset for offset in sorted(feeds) if offset in self._fed),
        )
        self._fed.update(feeds)
        return self._last

    def _commit(self, last: Pass, accepted: bool) -> list[int]:
        """Count the pass's cells as decided; returns the rows that it completed."""
        completed = []
        for row, column in last.yields:
            if (row, column) == last.trial and not accepted:
                continue
            self.decided[row] += 1
            if column == self.grid.columns - 1:
                completed.append(row)
        return completed

    def _flush(self, completed: list[int]) -> Iterator[Feed]:
        """The last tokens of completed rows: later rows need their keys and values."""
        for row in completed:
            yield Feed(self.grid.offset(row, self.grid.columns - 1), (row, self.grid.columns - 1))

    def _row_start(self) -> Feed | None:
        """The feeder of the next row's first token, if that row may start."""
        row = next((row for row, count in enumerate(self.decided) if count == 0), None)
        if row is None or not self.ready(row, 0):
            return None
        offset = self.grid.feeder(row, 0)
        return Feed(offset, None if self.grid.end_of_row else self._stand_in(row), (row, 0))

    def _stand_in(self, row: int) -> Cell:
        """The last token of the row above, or the decided one nearest to it while that is open."""
        if self.decided[row - 1] == self.grid.columns:
            return row - 1, self.grid.columns - 1
        nearest = max(row - 2, 0)
        return nearest, self.decided[nearest] - 1


@dataclass(frozen=True)
class ZipARSchedule:
    """The passes of a fixed window, as an iterable.

    Example:
        >>> schedule = ZipARSchedule(RasterGrid(4, 4, end_of_row=True), window=2, row_start="eol")
        >>> schedule.passes, len(list(schedule))
        (10, 10)
        >>> schedule.production()[1]
        [3, 4, 5, 6]

    Raises:
        ValueError: As `Frontier`.
    """

    grid: RasterGrid
    window: int
    row_start: RowStart

    def __post_init__(self) -> None:
        check_window(self.window, self.grid.columns)
        check_row_start(self.row_start, self.grid)

    @property
    def passes(self) -> int:
        """Number of forward passes in closed form; the prefix's pass counts."""
        return zipar_passes(self.grid.rows, self.grid.columns, self.window, self.row_start)

    def __iter__(self) -> Iterator[Pass]:
        frontier = Frontier(self.grid, self.window, self.row_start)
        while (step := frontier.advance()) is not None:
            yield step

    def steps(self) -> Iterator[Step]:
        """See `Schedule`."""
        return (each.step(self.grid) for each in self)

    def production(self) -> list[list[int]]:
        """The pass in which each cell is decided, by row; the prefix's pass is 1."""
        table = [[0] * self.grid.columns for _ in range(self.grid.rows)]
        for number, step in enumerate(self, start=1):
            for row, column in step.yields:
                table[row][column] = number
        return table


@dataclass(frozen=True)
class FrontPass:
    """One forward pass of NAR.

    Args:
        feeds: The cells whose tokens go in; the first pass feeds the prefix, and has none.
        yields: The cells that come out, one front of the grid.
    """

    feeds: tuple[tuple[int, ...], ...]
    yields: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class NARSchedule:
    """The passes of NAR, as an iterable: each takes in one front of the grid and gives the next.

    Args:
        sizes: ``(rows, columns)`` of an image, or ``(frames, rows, columns)`` of a video.

    Example:
        >>> schedule = NARSchedule((2, 3))
        >>> schedule.passes, [step.yields for step in schedule]
        (4, [((0, 0),), ((0, 1), (1, 0)), ((0, 2), (1, 1)), ((1, 2),)])
        >>> schedule.production()
        [1, 2, 3, 2, 3, 4]

    Raises:
        ValueError: If an axis is no whole number of at least 1.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        check_sizes(self.sizes)

    @property
    def passes(self) -> int:
        """Number of forward passes; the prefix's pass counts."""
        return front_count(self.sizes)

    def __iter__(self) -> Iterator[FrontPass]:
        before: tuple[tuple[int, ...], ...] = ()
        for front in fronts(self.sizes):
            yield FrontPass(before, tuple(front))
            before = tuple(front)

    def steps(self) -> Iterator[Step]:
        """See `Schedule`."""
        return group_steps(fronts(self.sizes), self.sizes)

    def production(self) -> list[int]:
        """The pass in which each cell is decided, in raster order; the prefix's pass is 1."""
        return [1 + sum(cell) for cell in product(*map(range, self.sizes))]


def zipar_passes(rows: int, columns: int, window: int, row_start: RowStart) -> int:
    """Forward passes of a fixed window: each row starts ``window`` passes after the one above.

    In conservative mode row 1 starts only after the whole of row 0.
    """
    if rows == 1:
        return columns
    if row_start == "conservative":
        return 2 * columns + (rows - 2) * window
    return columns + (rows - 1) * window


def raster_passes(grid: RasterGrid) -> int:
    """Forward passes of plain decoding, which spends one on every end-of-row token too."""
    return grid.length


def resolve_window(window_size: int | str, columns: int) -> int:
    """The window in cells: a number above the columns is clamped, a preset is a share of them, rounded up.

    Raises:
        ValueError: If a number is below 1, or a preset is unknown.
    """
    if isinstance(window_size, str):
        if window_size not in PRESETS:
            raise TersorError(f"window_size={window_size!r} is unknown; give a number of cells or one of {[*PRESETS]}")
        numerator, denominator = PRESETS[window_size]
        return -(-columns * numerator // denominator)
    check_window_size(window_size)
    return min(window_size, columns)


def check_window_size(window_size: object) -> None:
    """Raise `ValueError` unless ``window_size`` is a whole number of at least 1 or a preset's name."""
    if isinstance(window_size, str) and window_size in PRESETS:
        return
    if not isinstance(window_size, int) or isinstance(window_size, bool) or window_size < 1:
        raise TersorError(
            f"window_size={window_size!r} must be a whole number from 1 to the grid's columns, or one of {[*PRESETS]}"
        )


def check_window(window: int, columns: int) -> None:
    """Raise `ValueError` unless the window fits into a row."""
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= columns:
        raise TersorError(f"window {window!r} must be a whole number from 1 to {columns}, the grid's columns")


def check_row_start(row_start: str, grid: RasterGrid) -> None:
    """Raise `ValueError` unless rows of this grid can start in this way."""
    allowed = ("eol",) if grid.end_of_row else ("conservative", "eager")
    if row_start not in allowed:
        has = "has" if grid.end_of_row else "has no"
        raise TersorError(f"row_start={row_start!r}: this grid {has} end-of-row tokens, so it must be one of {allowed}")


def resolve_row_start(row_start: str, grid: RasterGrid) -> RowStart:
    """``"auto"`` as the grid has it: by the end-of-row token if there is one, else conservative."""
    if row_start == "auto":
        return "eol" if grid.end_of_row else "conservative"
    check_row_start(row_start, grid)
    return row_start  # type: ignore[return-value]
