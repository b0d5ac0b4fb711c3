"""The adaptive window, and models of which everything is known."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from transformers import DynamicCache

from tersor.grids.decoding import ready_steps
from tersor.grids.geometry import RasterGrid
from tersor.grids.sampling import Sampler
from tersor.grids.schedule import Frontier, zipar_passes
from tersor.grids.zipar.adapters import Prefix, RasterAdapter
from tersor.grids.zipar.decoding import Decoder, Trial

PREFIX = 2


class Known(RasterAdapter):
    """A model without weights: its cache holds ids and positions, and ``law`` makes logits from what is visible.

    ``law(sample, cell, visible)`` gets the visible image tokens by offset; where two slots claim one offset, the
    older one counts, so that a stale proxy does harm.
    """

    max_positions = None

    def __init__(self, grid, law) -> None:
        self.image, self.law = grid, law

    def embed_image(self, ids):
        return ids[..., None].float()

    def logits(self, embeddings, positions, mask, cache, keep):
        held = positions.expand(embeddings.shape[:2])[:, None, :, None].float()
        where, ids = cache.update(held, embeddings[:, None], 0)
        rows = []
        for sample in range(embeddings.shape[0]):
            for query in keep:
                shown = (mask[sample % len(mask), 0, query] == 0).nonzero().flatten().tolist()
                visible: dict[int, int] = {}
                for slot in shown:
                    offset = int(where[sample, 0, slot, 0]) - PREFIX
                    visible.setdefault(offset, int(ids[sample, 0, slot, 0]))
                offset = int(positions.expand(embeddings.shape[:2])[sample, query]) - PREFIX + 1
                rows.append(self.law(sample, divmod(offset, self.image.stride), visible))
        return torch.stack(rows).unflatten(0, (embeddings.shape[0], len(keep)))


def run(grid, law, window, mode, *, batch=1, adaptive=False, do_sample=False, generator=None):
    ids = torch.zeros(batch, PREFIX, dtype=torch.long)
    # Prefix tokens differ from sample to sample by nothing but their row, which `law` gets.
    prefix = Prefix.padded(ids[..., None].float() - 1, torch.ones_like(ids, dtype=torch.bool), ids)
    frontier = Frontier(grid, window, mode, adaptive=adaptive)
    eol = 99 if grid.end_of_row else None
    sampler = Sampler([], do_sample, generator)
    return Decoder(Known(grid, law), prefix, frontier, sampler, DynamicCache(), eol_id=eol).run()


def local_law(grid, reach, vocabulary=7):
    """Logits that depend on the left cell and on ``reach`` cells above from the same column on, and on nothing else."""

    def law(sample, cell, visible):
        row, column = cell
        needed = [grid.offset(row, column - 1)] if column else []
        if row:
            needed += [grid.offset(row - 1, k) for k in range(column, min(column + reach, grid.columns))]
        context = [sample, row, column, *(visible.get(each, -1) for each in needed)]
        generator = torch.Generator().manual_seed(hash(tuple(context)) % 2**31)
        return torch.randn(vocabulary, generator=generator)

    return law


@pytest.mark.parametrize("mode", ["eol", "conservative", "eager"])
def test_a_model_that_looks_at_its_window_only_loses_nothing(mode) -> None:
    grid = RasterGrid(4, 5, end_of_row=mode == "eol")
    for reach in range(1, 6):
        law = local_law(grid, reach)
        full = run(grid, law, 5, mode, batch=3)
        for window in range(reach, 6):
            assert torch.equal(run(grid, law, window, mode, batch=3).ids, full.ids)
        for window in range(1, reach):
            assert not torch.equal(run(grid, law, window, mode, batch=3).ids, full.ids)


@pytest.mark.parametrize("mode", ["eol", "conservative", "eager"])
def test_a_smaller_readiness_would_be_noticed(mode, monkeypatch, request) -> None:
    grid = RasterGrid(4, 5, end_of_row=mode == "eol")
    law = local_law(grid, 3)
    full = run(grid, law, 5, mode, batch=3)
    honest = RasterGrid.ready
    monkeypatch.setattr(RasterGrid, "ready", lambda self, row, c, window, n: honest(self, row, c, window - 1, n))
    ready_steps.cache_clear()
    request.addfinalizer(ready_steps.cache_clear)
    assert not torch.equal(run(grid, law, 3, mode, batch=3).ids, full.ids)


def above(grid, cell, visible):
    """How many tokens of the row above are visible."""
    return sum(grid.offset(cell[0] - 1, k) in visible for k in range(grid.columns))


@pytest.mark.parametrize("do_sample", [True, False])
def test_equal_laws_are_always_accepted(do_sample) -> None:
    for mode, window in product(("eol", "conservative"), (1, 2, 3)):
        grid = RasterGrid(5, 6, end_of_row=mode == "eol")
        generator = torch.Generator().manual_seed(0)
        fixed = torch.randn(7, generator=generator)
        done = run(
            grid, lambda *_, law=fixed: law, window, mode, adaptive=True, do_sample=do_sample, generator=generator
        )
        assert done.forward_passes == zipar_passes(5, 6, window + 1, mode)


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("mode", ["eol", "conservative", "eager"])
def test_disjoint_laws_are_always_rejected_until_the_row_above_is_complete(do_sample, mode) -> None:
    grid = RasterGrid(4, 6, end_of_row=mode == "eol")

    def law(sample, cell, visible):
        only = torch.full((7,), -math.inf)
        only[above(grid, cell, visible) % 7 if cell[1] == 0 and cell[0] else 3] = 0
        return only

    done = run(grid, law, 2, mode, adaptive=True, do_sample=do_sample, generator=torch.Generator())
    assert [b - a for a, b in zip(done.row_start_pass, done.row_start_pass[1:], strict=False)] == [6, 6, 6]
    # What the last step drew follows the law of the full row.
    assert [int(done.ids[0, grid.offset(row, 0)]) for row in range(1, 4)] == [6, 6, 6]


def test_each_row_starts_with_a_trial_of_its_own() -> None:
    grid = RasterGrid(3, 6, end_of_row=True)

    def law(sample, cell, visible):
        only = torch.full((7,), -math.inf)
        # Row 1 changes its mind until row 0 is complete; row 2 wants from the start what row 1 wanted last.
        only[above(grid, cell, visible) if cell == (1, 0) else 6] = 0
        return only

    done = run(grid, law, 2, "eol", adaptive=True)
    assert done.row_start_pass == [1, 7, 10], "a candidate and one verification, not the other row's"


def test_random_models_keep_the_least_distance(case) -> None:
    rows, columns = case.grid
    mode = "eol" if case.end_of_row else "conservative"
    for least, batch in product((1, 2), (1, 3)):
        generator = torch.Generator().manual_seed(least)
        out = case.zipar(
            case.inputs(batch, False), window_size=least, adaptive=True, do_sample=True, generator=generator
        )
        assert all(each >= least + 1 for each in out.window_used[1:])
        assert zipar_passes(rows, columns, least + 1, mode) <= out.forward_passes <= rows * columns


def test_an_adaptive_full_window_is_raster(case) -> None:
    inputs = case.inputs(2, False)
    out = case.zipar(inputs, window_size=case.grid[1], adaptive=True)
    assert torch.equal(out.sequences, case.raster(inputs, 1.0))


DRAWS = 20_000


def chi_square(ids, expected) -> float:
    """Statistic over its degrees of freedom's 99.9 % point, so that above 1 is a failure."""
    counts = torch.bincount(ids, minlength=len(expected)).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - DRAWS * expected) ** 2 / (DRAWS * expected))[possible].sum().item()
    points = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}
    return statistic / points[int(possible.sum()) - 1]


def exact_law(laws):
    """Law of an id after verification under each of ``laws`` in turn, by summation."""
    q, pending, settled = laws[0], laws[0].clone(), torch.zeros_like(laws[0])
    for p in laws[1:]:
        kept = pending * torch.where(q > 0, p / q.clamp_min(1e-30), torch.tensor(math.inf)).clamp_max(1).nan_to_num()
        rest = (p - q).clamp_min(0)
        lost = (pending - kept).sum()
        settled, pending, q = settled + kept, lost * rest / rest.sum().clamp_min(1e-30), p
    return settled + pending


LAWS = torch.tensor(
    [[0.4, 0.3, 0.2, 0.1, 0.0], [0.1, 0.3, 0.2, 0.2, 0.2], [0.3, 0.0, 0.3, 0.2, 0.2]], dtype=torch.float64
)


def test_one_verification_gives_the_new_law_by_accepting_or_drawing_anew() -> None:
    generator = torch.Generator().manual_seed(1)
    q, p = (each.float().expand(DRAWS, -1) for each in LAWS[:2])
    candidates = torch.multinomial(q, 1, generator=generator).squeeze(-1)
    trial = Trial(candidates, q, torch.zeros(DRAWS, dtype=torch.bool)).verify(p, generator)
    assert chi_square(trial.ids, LAWS[1]) < 1
    assert trial.accepted.float().mean().item() == pytest.approx(torch.minimum(*LAWS[:2]).sum().item(), abs=0.015)
    taken, drawn = trial.ids[trial.accepted], trial.ids[~trial.accepted]
    assert not set(drawn.tolist()) & {0, 1, 2}, "anew only where p exceeds q"
    assert torch.equal(taken, candidates[trial.accepted])
    # Accepted ones stay; a rejected one is compared with the law it was drawn for.
    again = trial.verify(LAWS[2].float().expand(DRAWS, -1), generator)
    assert torch.equal(again.ids[trial.accepted], taken)


@pytest.mark.parametrize("wrong", ["none", "always", "ratio"])
def test_a_row_start_follows_the_exact_mixture(wrong, monkeypatch) -> None:
    grid = RasterGrid(2, 3, end_of_row=True)

    class Batch(RasterAdapter):
        """The law of x[1, 0] by how many tokens of row 0 were visible; every sample alike."""

        max_positions = None

        def __init__(self) -> None:
            pass

        def embed_image(self, ids):
            return ids[..., None].float()

        def logits(self, embeddings, positions, mask, cache, keep):
            cache.update(embeddings[:, None], embeddings[:, None], 0)
            offsets = (positions[0] - PREFIX).tolist()
            rows = [LAWS[0]] * len(keep)
            for index, query in enumerate(keep):
                if offsets[query] == grid.feeder(1, 0):
                    # Each pass feeds one more token of row 0 beside the row start.
                    rows[index] = LAWS[min(max(each for each in offsets if each < grid.columns), 2)]
            return torch.stack(rows).log().float().expand(len(embeddings), -1, -1)

    if wrong == "always":
        monkeypatch.setattr(Trial, "verify", lambda self, law, _: Trial(self.ids, law, torch.ones_like(self.accepted)))
    if wrong == "ratio":
        honest = Trial.verify
        monkeypatch.setattr(Trial, "verify", lambda self, law, g: honest(self, self.law * 0 + law.flip(-1), g))
    ids = torch.zeros(DRAWS, PREFIX, dtype=torch.long)
    prefix = Prefix.padded(ids[..., None].float(), torch.ones_like(ids, dtype=torch.bool), ids)
    sampler = Sampler([], True, torch.Generator().manual_seed(2))
    frontier = Frontier(grid, 1, "eol", adaptive=True)
    done = Decoder(Batch(), prefix, frontier, sampler, DynamicCache(), eol_id=9).run()
    assert wrong != "none" or done.row_start_pass == [1, 4], "in a batch of 20,000 someone rejects"
    statistic = chi_square(done.ids[:, grid.offset(1, 0)], exact_law(LAWS))
    assert (statistic < 1) == (wrong == "none")
