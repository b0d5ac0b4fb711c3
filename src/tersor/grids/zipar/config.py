"""How far ZipAR lets rows run ahead."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, fields
from typing import Literal

from tersor._errors import TersorError
from tersor.grids.geometry import RasterGrid
from tersor.grids.schedule import ROW_STARTS, Frontier, check_window_size, resolve_row_start, resolve_window


@dataclass(frozen=True, kw_only=True)
class ZipARConfig:
    """How far rows run ahead.

    Args:
        window_size: Columns of the row above that must be decided before a row starts: a number, or "quality" (2/3 of
            the columns), "balanced" (1/2) or "fast" (1/4). All columns is raster decoding.
        adaptive: Verify each row's first token and let it wait while the model changes its mind; ``window_size`` is
            then the least distance.
        row_start: "eol" by the end-of-row token; without one "conservative" (row 1 waits for the whole of row 0, as
            in the authors' code) or "eager"; "auto" is the first of them that the model has.

    Raises:
        ValueError: If a setting is outside its range.
    """

    window_size: int | str = "balanced"
    adaptive: bool = False
    row_start: Literal["auto", "eol", "conservative", "eager"] = "auto"

    def __post_init__(self) -> None:
        check_window_size(self.window_size)
        if not isinstance(self.adaptive, bool):
            raise TersorError(f"adaptive={self.adaptive!r} must be True or False")
        if self.row_start not in ("auto", *ROW_STARTS):
            raise TersorError(f"row_start={self.row_start!r} must be one of {('auto', *ROW_STARTS)}")

    @property
    def one_generator(self) -> bool:
        """Whether all images of a batch must be drawn from the same generator."""
        return self.adaptive

    def check(self, grid: RasterGrid) -> None:
        """Raise `ValueError` if the grid does not have the row start; warn about a window that it does not have."""
        if isinstance(self.window_size, int) and self.window_size > grid.columns:
            told = f"window_size={self.window_size} is more than the grid's {grid.columns} columns: raster decoding"
            warnings.warn(told, stacklevel=6)
        self.frontier(grid)

    def frontier(self, grid: RasterGrid) -> Frontier:
        """The order, at its start."""
        row_start, window = resolve_row_start(self.row_start, grid), resolve_window(self.window_size, grid.columns)
        return Frontier(grid, window, row_start, adaptive=self.adaptive)

    def to_json(self) -> str:
        """The settings as one JSON object."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ZipARConfig:
        """Read what `to_json` wrote; unknown settings raise `ValueError`."""
        settings = json.loads(text)
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise TersorError(f"ZipARConfig has no settings {unknown}; it has {sorted(known)}")
        return cls(**settings)
