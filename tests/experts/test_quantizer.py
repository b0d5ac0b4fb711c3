"""The quantizer's formulas, its steps, and the scores of channels."""

from __future__ import annotations

import pytest
import torch

from tersor.experts.config import DeltaConfig, DeltaFormatError
from tersor.experts.quantizer import FLOOR, Grid, initial_step, robust_step
from tersor.experts.saliency import channel_scores, most_salient, reconstruction_error

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


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def test_the_factorised_error_is_the_triple_sum() -> None:
    delta, x = noise(6, 9), noise(11, 9, seed=1)
    rounded = Grid(2, False).rounded(delta, initial_step(delta, Grid(2, False), "mse"))
    found = reconstruction_error(delta, rounded, x.square().sum(0))
    for channel in range(9):
        total = 0.0
        for token in range(11):
            for output in range(6):
                difference = float(delta[output, channel]) - float(rounded[output, channel])
                total += (float(x[token, channel]) * difference) ** 2
        assert float(found[channel]) == pytest.approx(total, rel=1e-6)


def test_scores_and_ties() -> None:
    delta, energy = noise(6, 9), torch.arange(9.0)
    rounded = torch.zeros_like(delta)
    scores = {
        name: channel_scores(name, delta, rounded, energy, name="a")
        for name in ("reconstruction", "magnitude", "weight_error", "activation", "wanda", "random")
    }
    assert torch.equal(scores["weight_error"], scores["magnitude"])
    assert torch.equal(scores["activation"], energy.double())
    assert torch.allclose(scores["wanda"], energy.double().sqrt() * delta.double().abs().sum(0))
    assert torch.equal(scores["random"], channel_scores("random", delta, rounded, energy, name="a"))
    assert not torch.equal(scores["random"], channel_scores("random", delta, rounded, energy, name="b"))
    assert scores["reconstruction"][0] == 0
    tied = torch.tensor([0.0, 2.0, 5.0, 2.0, 2.0, 0.0])
    assert most_salient(tied, 2).tolist() == [1, 2]
    assert most_salient(tied, 5).tolist() == [1, 2, 3, 4], "a channel of score 0 is never salient"
    assert most_salient(tied, 6).tolist() == [0, 1, 2, 3, 4, 5], "unless all are wanted"


BAD = {
    "bits": 5,
    "grid": "round",
    "num_salient": -1,
    "selection": "best",
    "selection_rounds": 0,
    "step_init": "max",
    "distill": "logits",
    "distill_steps": 1.5,
    "distill_rate": 1.0,
    "step_dtype": "bfloat16",
    "salient_dtype": "float8",
}


@pytest.mark.parametrize("name", BAD)
def test_settings_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        DeltaConfig(**{name: BAD[name]})


def test_settings_round_trip_and_counts() -> None:
    config = DeltaConfig(bits=4, num_salient={"q_proj": 0.1, "o_proj": 3}, full_modules=("gate",))
    assert DeltaConfig.from_dict(config.to_dict()) == config
    assert [config.salient_of(f"layers.0.{name}", 95) for name in ("q_proj", "o_proj", "up_proj")] == [10, 3, 0]
    assert DeltaConfig(num_salient=500).salient_of("q", 96) == 96
    for wrong in (1.5, -0.1):
        with pytest.raises(ValueError, match="num_salient"):
            DeltaConfig(num_salient=wrong)
    for wrong in ("eight", True):
        with pytest.raises(TypeError, match="num_salient"):
            DeltaConfig(num_salient=wrong)
    with pytest.raises(DeltaFormatError, match="fields"):
        DeltaConfig.from_dict({"bits": 2})
    with pytest.raises(DeltaFormatError, match="bits=7"):
        DeltaConfig.from_dict({**config.to_dict(), "bits": 7})
    with pytest.raises(ValueError, match="bits"):
        DeltaConfig(bits=2.0)
