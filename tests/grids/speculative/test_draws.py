"""How a draft is tested: by its cell's noise, by the coupling, by its group."""

from __future__ import annotations

import pytest
import torch

from tersor.grids.sampling import Sampler
from tersor.grids.speculative.draws import Coupled, Grouped, SeedExact

pytestmark = pytest.mark.usefixtures("poison_empty")
DRAWS = 20_000


def law(*shares: float) -> torch.Tensor:
    return torch.tensor(shares).expand(DRAWS, 1, -1)


def sampler(seed: int = 1) -> Sampler:
    return Sampler([], True, torch.Generator().manual_seed(seed))


def test_a_cells_noise_gives_the_token_of_multinomial_and_the_same_one_again() -> None:
    draws, expected, like = SeedExact(sampler()), torch.Generator().manual_seed(1), torch.empty(4, 9)
    first, second = torch.rand(2, 4, 9, generator=torch.Generator().manual_seed(2)).softmax(-1)
    for ends_row in (True, False):
        draws.enter(like, None, ends_row=ends_row)
    found = draws.draw(torch.stack([first, second], dim=1))
    assert torch.equal(found[:, 0], torch.multinomial(first, 1, generator=expected)[:, 0])
    torch.multinomial(first, 1, generator=expected)  # the end of the row
    assert torch.equal(found[:, 1], torch.multinomial(second, 1, generator=expected)[:, 0])
    draws.leave(1)
    assert torch.equal(draws.test(second[:, None], found[:, :1], None)[:, 0], found[:, 1])


def test_noise_is_drawn_for_all_ids_and_kept_for_those_that_are_allowed() -> None:
    allowed, like = torch.tensor([2, 5, 6]), torch.empty(4, 9)
    whole, part = SeedExact(sampler()), SeedExact(sampler())
    whole.enter(like, None, ends_row=False)
    part.enter(like, allowed, ends_row=False)
    shares = torch.rand(4, 1, 9, generator=torch.Generator().manual_seed(2))
    only = torch.zeros_like(shares).index_copy(-1, allowed, shares[..., allowed])
    assert torch.equal(allowed[part.draw(shares[..., allowed])], whole.draw(only))


def test_the_coupling_gives_the_new_law_and_keeps_all_that_both_laws_share() -> None:
    q, p = law(0.4, 0.3, 0.2, 0.1), law(0.1, 0.3, 0.2, 0.4)
    draws = Coupled(sampler())
    drafts = draws.draw(q)
    found = draws.test(p, drafts, q)
    shares = torch.bincount(found.flatten(), minlength=4) / DRAWS
    torch.testing.assert_close(shares, p[0, 0], atol=0.012, rtol=0)
    kept = found == drafts
    assert kept.float().mean().item() == pytest.approx(torch.minimum(p, q)[0, 0].sum().item(), abs=0.012)
    assert set(found[~kept].tolist()) == {3}, "anew only where p exceeds q"
    assert torch.equal(draws.test(p, found, p), found), "an equal law keeps everything"


def test_a_group_holds_what_is_near_in_rank_probability_and_embedding() -> None:
    places = torch.tensor([0.0, 0.1, 0.2, 9.0, 0.3])
    draws = Grouped(sampler(), lambda ids: places[ids][..., None])
    p, q = law(0.3, 0.25, 0.05, 0.22, 0.18)[:1], law(0.1, 0.2, 0.3, 0.2, 0.2)[:1]
    # Of id 0: 1 and 4 are near; 2 is less likely by more than 0.15, 3 lies elsewhere.
    own, drafted = draws.masses(p, q, torch.tensor([[0]]))
    torch.testing.assert_close(torch.stack([own, drafted]).flatten(), torch.tensor([0.73, 0.5]))
    many = torch.full((1, 1, 40), 1 / 40)
    wide = Grouped(sampler(), lambda ids: torch.zeros(*ids.shape, 1))
    for draft, size in ((0, 1 + 7), (20, 14), (39, 1 + 6)):
        order = many - 1e-4 * torch.arange(40)
        own, _ = wide.masses(order, many, torch.tensor([[draft]]))
        ranks = torch.arange(max(0, draft - 6), min(40, draft + 8))
        assert len(ranks) == size
        torch.testing.assert_close(own[0, 0], order[0, 0, ranks].sum())


def test_greedy_decoding_takes_the_largest_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    draws, state = SeedExact(Sampler([], False, generator)), generator.get_state()
    draws.enter(torch.empty(2, 3), None, ends_row=True)
    assert draws.test(torch.tensor([[[0.1, 0.7, 0.2]]]), torch.zeros(1, 1), None).tolist() == [[1]]
    draws.random(2, 5, 7, torch.device("cpu"))
    assert torch.equal(generator.get_state(), state) and draws.noise == []
