"""The quantizer of weight deltas: symmetric, uniform, one step for each output channel, no zero point.

    signed:   q = clamp(round(D / s), -2^(b-1), 2^(b-1) - 1),  D^ = s q
    midrise:  q = clamp(floor(D / s), -2^(b-1), 2^(b-1) - 1),  D^ = s (q + 1/2)

Stored is ``u = q + 2^(b-1)``, so ``D^ = s (u - zero)`` with ``zero = 2^(b-1)``, less a half for midrise. One bit is
always midrise: the sign code of BitDelta (arXiv 2402.10193). ME-Switch says that steps are learnable, not where they
start; the search for the least squared error is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Least step; a row of zeros is exact on the signed grid with any step.
FLOOR = 1e-12
#: Shares of a row's largest delta, times ``2 / 2^b``, that are tried as its step.
SEARCH = torch.linspace(0.1, 2.0, 96)
#: Numbers searched at a time, so that they stay in cache.
_BLOCK = 2**17


@dataclass(frozen=True)
class Grid:
    """The numbers that ``bits`` bits stand for, in steps."""

    bits: int
    midrise: bool

    @property
    def half(self) -> int:
        """``2^(b-1)``."""
        return 1 << (self.bits - 1)

    @property
    def zero(self) -> float:
        """What is subtracted from a stored code."""
        return self.half - (0.5 if self.midrise else 0.0)

    def encode(self, delta: Tensor, step: Tensor) -> Tensor:
        """Stored codes ``u`` (uint8 ``[out, in]``) of ``delta`` ``[out, in]`` with ``step`` ``[out]``."""
        ratio = delta / torch.where(step == 0, 1.0, step)[:, None]
        q = ratio.floor() if self.midrise else ratio.round()
        return (q.clamp(-self.half, self.half - 1) + self.half).to(torch.uint8)

    def decode(self, codes: Tensor, step: Tensor) -> Tensor:
        """``D^``, float32 ``[out, in]``."""
        return (codes.float() - self.zero) * step.float()[:, None]

    def rounded(self, delta: Tensor, step: Tensor) -> Tensor:
        """``D^`` of ``delta``: quantized and read back."""
        return self.decode(self.encode(delta, step), step)


def initial_step(delta: Tensor, grid: Grid, method: str) -> Tensor:
    """Steps ``[out]`` of a float32 delta ``[out, in]``, by "mse", "lsq" or "minmax".

    A row of zeros gets `FLOOR` on the signed grid and 0 on the midrise one; both give zeros back.
    """
    if delta.shape[1] == 0:
        return delta.new_zeros(len(delta))
    size = delta.abs()
    if method == "minmax":
        step = size.amax(1) / max(1, grid.half - 1)
    elif method == "lsq" or (grid.bits == 1 and grid.midrise):
        # For one bit this is the step of least squared error: half of it is the mean size.
        step = 2 * size.mean(1) / max(1, grid.half - 1) ** 0.5
    else:
        step = torch.cat([_search(rows, grid) for rows in torch.split(delta, max(1, _BLOCK // delta.shape[1]))])
    return torch.where(size.amax(1) == 0, 0.0, step) if grid.midrise else step.clamp_min(FLOOR)


def robust_step(delta: Tensor) -> Tensor:
    """A step that outliers of a row don't move, of about the least error for Gaussian rows in two bits."""
    return (1.04 / 0.6745 * delta.abs().median(1).values).clamp_min(FLOOR)


def _search(delta: Tensor, grid: Grid) -> Tensor:
    """Per row the step of least squared error among `SEARCH`, the smaller one of equals."""
    unit = delta.abs().amax(1) / grid.half
    tried = [unit * share for share in SEARCH.tolist()]
    errors = torch.stack([_squared_error(delta, step, grid) for step in tried])
    best, place = errors.min(0)
    step = torch.stack(tried).gather(0, place[None])[0]
    # A single huge delta makes all of them too long: go on downwards while that helps.
    open_rows = (place == 0).nonzero().flatten()
    while len(open_rows):
        shorter = step[open_rows] / 2
        error = _squared_error(delta[open_rows], shorter, grid)
        better = error < best[open_rows]
        open_rows = open_rows[better]
        step[open_rows], best[open_rows] = shorter[better], error[better]
    return step


def _squared_error(delta: Tensor, step: Tensor, grid: Grid) -> Tensor:
    return (delta - grid.rounded(delta, step)).square().sum(1)
