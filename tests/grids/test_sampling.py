"""Masks, guidance and draws, on scores that are known."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper

from tersor.grids.sampling import Sampler, exponential, stays

pytestmark = pytest.mark.usefixtures("poison_empty")


def test_infinity_can_be_taken_but_not_drawn() -> None:
    scores, cells = torch.zeros(2, 3, 4), ((0, 2), (1, 1), (2, 0))
    scores[1, 1, 3] = torch.inf
    greedy, sampling = (Sampler([], do_sample) for do_sample in (False, True))
    assert greedy.draw(greedy.process(scores, cells, lambda cell: scores))[1, 1] == 3
    with pytest.raises(ValueError, match="row 1, column 1"):
        sampling.process(scores, cells, lambda cell: scores)


def test_draws_are_those_of_multinomial() -> None:
    scores = 4 * torch.randn(3, 5, 50, generator=torch.Generator().manual_seed(1))
    scores[..., ::3] = -torch.inf
    one, other = (torch.Generator().manual_seed(2) for _ in range(2))
    expected = torch.multinomial(scores.softmax(-1).flatten(0, 1), 1, generator=one).view(3, 5)
    assert torch.equal(Sampler([], True, other).draw(scores), expected)
    assert torch.equal(one.get_state(), other.get_state())


def test_noise_of_an_image_with_its_own_generator_is_that_of_the_image_alone() -> None:
    like = torch.zeros(3, 5)
    noise = exponential(like, [torch.Generator().manual_seed(seed) for seed in range(3)])
    for seed in range(3):
        assert torch.equal(noise[seed : seed + 1], exponential(like[:1], torch.Generator().manual_seed(seed)))
    assert torch.equal(
        exponential(like, torch.Generator().manual_seed(4)), exponential(like, torch.Generator().manual_seed(4))
    )
    with pytest.raises(ValueError, match="shorter"):
        exponential(like, [torch.Generator()])


def test_a_draft_stays_as_often_as_it_may() -> None:
    p, q = torch.tensor([0.1, 0.4, 0.5, 0.0]), torch.tensor([0.4, 0.1, 0.5, 0.0])
    found = stays(p.expand(20_000, 4), q.expand(20_000, 4), torch.Generator().manual_seed(1)).float().mean(0)
    torch.testing.assert_close(found, torch.tensor([0.25, 1.0, 1.0, 1.0]), atol=0.01, rtol=0)


def test_processors_that_read_only_scores_run_once_for_all_rows() -> None:
    calls = []

    class Counted(TemperatureLogitsWarper):
        def __call__(self, ids, scores):
            calls.append(tuple(scores.shape))
            return super().__call__(ids, scores)

    sampler = Sampler([lambda ids, scores: scores + ids.shape[1], Counted(2.0)], do_sample=False)
    cells = ((0, 2), (1, 1), (2, 0))
    out = sampler.process(torch.zeros(2, 3, 4), cells, lambda i: torch.zeros(2, 10 * cells[i][0] + cells[i][1]))
    assert out[0, :, 0].tolist() == [1, 5.5, 10]
    assert calls == [(6, 4)]
