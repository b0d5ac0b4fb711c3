"""The quantizer's formulas, its steps, and the scores of channels."""

from __future__ import annotations

import pytest
import torch
from tuned_models import noise

from tersor.experts.quantizer import FLOOR, Grid, initial_step, robust_step

#: Least mean squared error of a standard normal number, and the step that has it: by bits, signed and mid-rise.
GAUSSIAN = {
    (1, True): (0.364, 1.60),
    (2, False): (0.150, 1.04),
    (2, True): (0.119, 1.00),
    (3, False): (0.041, 0.60),
    (3, True): (0.038, 0.58),
    (4, False): (0.0119, 0.34),
    (4, True): (0.0116, 0.34),
}


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("midrise", [False, True])
@pytest.mark.parametrize("dim", [1, 3, 5, 96])
def test_codes_are_those_of_the_formula(bits: int, midrise: bool, dim: int) -> None:
    grid, delta = Grid(bits, midrise), noise(7, dim)
    step = initial_step(delta, grid, "mse")
    codes = grid.encode(delta, step)
    for row in range(7):
        for channel in range(dim):
            ratio = delta[row, channel] / step[row]
            q = int(codes[row, channel]) - 2 ** (bits - 1)
            wanted = ratio.floor() if midrise else ratio.round()
            assert q == int(wanted.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
            value = float(step[row]) * (q + (0.5 if midrise else 0.0))
            assert float(grid.decode(codes, step)[row, channel]) == pytest.approx(value, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("bits", "midrise"), GAUSSIAN)
def test_error_of_gaussian_deltas(bits: int, midrise: bool) -> None:
    error, step = GAUSSIAN[bits, midrise]
    grid, delta = Grid(bits, midrise), noise(1, 400_000)
    least = (delta - grid.rounded(delta, torch.tensor([step]))).square().mean()
    assert float(least) == pytest.approx(error, rel=0.02)
    found = (delta - grid.rounded(delta, initial_step(delta, grid, "mse"))).square().mean()
    assert float(found) < 1.02 * error


@pytest.mark.parametrize("method", ["mse", "lsq", "minmax"])
@pytest.mark.parametrize("midrise", [False, True])
def test_rows_of_zeros_and_equal_numbers(method: str, midrise: bool) -> None:
    grid, delta = Grid(2, midrise), torch.zeros(3, 8)
    delta[1] = 0.25
    step = initial_step(delta, grid, method)
    rounded = grid.rounded(delta, step)
    assert torch.equal(rounded[[0, 2]], delta[[0, 2]])
    assert float(step[0]) == (0.0 if midrise else pytest.approx(FLOOR))
    assert bool((rounded[1] == rounded[1, 0]).all())


def test_steps_follow_their_definitions() -> None:
    delta = noise(5, 64)
    assert torch.allclose(initial_step(delta, Grid(4, False), "minmax"), delta.abs().amax(1) / 7)
    assert torch.allclose(initial_step(delta, Grid(3, False), "lsq"), 2 * delta.abs().mean(1) / 3**0.5)
    assert torch.allclose(initial_step(delta, Grid(1, True), "mse"), 2 * delta.abs().mean(1))
    delta[:, 3] = 1e4
    assert bool((initial_step(delta, Grid(2, False), "minmax") == 1e4).all())
    assert bool((robust_step(delta) < 3).all())


def test_a_huge_delta_does_not_stop_the_search() -> None:
    """It makes all steps that are searched first too long."""
    delta = noise(1, 4096)
    delta[0, 0] = 40.0
    step = initial_step(delta, Grid(2, False), "mse")
    assert float(step) < 0.9 * 40.0 / 2 * 0.1
