"""How speculative decoding drafts and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tersor._errors import TersorError
from tersor.grids.geometry import RasterGrid

Mode = Literal["seed", "law", "grouped"]
FirstDrafts = Literal["above", "left", "random", "law above", "law left"]
#: Cells of the window that "auto" takes at most, on a CPU and on other devices; and tokens of a pass, on a CPU.
MOST_ON_CPU, MOST, TOKENS_ON_CPU = 32, 128, 256


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How speculative decoding drafts and tests.

    Args:
        window_size: Cells that a pass tests at most, or "auto": two rows, but at most 128 cells, and on a CPU, where
            each costs time, 32 cells and 256 tokens of all images and branches. One cell is raster decoding.
        mode: "seed" draws the image that raster decoding draws from the same generator. "law" keeps drafts more often
            and draws from the same distribution, but another image. "grouped" keeps them still more often, and
            **changes the distribution**.
        first_drafts: A cell's first draft: a copy of the cell "above" (in the first row, of the one to the left) or to
            the "left", an id that is drawn from their latest distribution ("law above", "law left"), or any id
            ("random").

    Raises:
        ValueError: If a setting is outside its range.
    """

    window_size: int | str = "auto"
    mode: Mode = "seed"
    first_drafts: FirstDrafts = "above"

    def __post_init__(self) -> None:
        size = self.window_size
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise TersorError(f"window_size={size!r} must be a whole number of cells of at least 1, or 'auto'")
        if self.mode not in get_args(Mode):
            raise TersorError(f"mode={self.mode!r} must be one of {get_args(Mode)}")
        if self.first_drafts not in get_args(FirstDrafts):
            raise TersorError(f"first_drafts={self.first_drafts!r} must be one of {get_args(FirstDrafts)}")

    @property
    def one_generator(self) -> bool:
        """Whether all images of a batch must be drawn from the same generator."""
        return self.mode != "seed"

    def check(self, grid: RasterGrid) -> None:
        """Every grid can be decoded."""

    def window(self, grid: RasterGrid, device: str, rows: int) -> int:
        """Cells of the window.

        Args:
            grid: Of the images.
            device: Type of the device.
            rows: Of a pass: images, times two with guidance.
        """
        if isinstance(self.window_size, int):
            return self.window_size
        most = max(1, min(MOST_ON_CPU, TOKENS_ON_CPU // rows)) if device == "cpu" else MOST
        return min(2 * grid.columns, most)
