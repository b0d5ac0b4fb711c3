"""Which cells a pass of speculative decoding tests, and where their first drafts come from. Pure Python."""

from __future__ import annotations

from tersor.grids.geometry import RasterGrid
from tersor.grids.schedule import Step


class Window:
    """The cells after the decided ones, whose drafts are tested together; cells count in raster order, from 0.

    Args:
        grid: The image.
        size: Cells of the window.
        above: Whether first drafts come from the cell above, or always from the one to the left.

    Attributes:
        decided: How many cells are decided.
        tested: The cells that the pass yields.
        new: The ones of them whose first draft is due before the pass.
        origins: For each of those the cell that it comes from, which holds a token.
    """

    def __init__(self, grid: RasterGrid, size: int, *, above: bool) -> None:
        self.grid, self.size, self.above = grid, size, above
        self.cells = grid.rows * grid.columns
        self.decided = 0
        self.tested = self.new = range(0)
        self.origins: list[int] = []

    def place(self, cell: int) -> int:
        """Position of a cell, counted from the first token after the prefix."""
        return self.grid.offset(*divmod(cell, self.grid.columns))

    def advance(self, decided: int) -> Step | None:
        """Count the cells that the last pass decided and build the next pass; None when the image is complete.

        A pass feeds the last decided cell, whose slot holds a draft that was not kept, and all drafts but the last. An
        end-of-row token between them is fed too.
        """
        self.decided += decided
        if self.decided == self.cells:
            return None
        first, end = self.decided, min(self.decided + self.size, self.cells)
        if first == 0:  # the prefix's pass, which gives the first cell
            self.tested = range(1)
            return Step(((0, 0),), (0,))
        self.new = range(max(first, self.tested.stop), end)
        self.origins = [self._origin(cell, self.new.start) for cell in self.new]
        self.tested = range(first, end)
        targets = tuple(self.place(cell) for cell in self.tested)
        begin = self.place(first - 1)
        fed = tuple(range(begin, targets[-1]))
        cells = tuple(divmod(cell, self.grid.columns) for cell in self.tested)
        return Step(cells, targets, fed, fed, tuple(target - 1 - begin for target in targets))

    def _origin(self, cell: int, known: int) -> int:
        """The nearest cell above, or to the left, among the first ``known`` ones."""
        while cell >= known:
            cell -= self.grid.columns if self.above and cell >= self.grid.columns else 1
        return cell
