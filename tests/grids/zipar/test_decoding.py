"""ZipAR's decoder: what a token sees, the adaptive window, and models of which everything is known."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import product

import pytest
import torch
from transformers import DynamicCache

from tersor.grids.decoding import ready_steps
from tersor.grids.geometry import RasterGrid
from tersor.grids.raster.adapters import Prefix, RasterAdapter, find_adapter
from tersor.grids.raster.slots import SlotLayer, Slots
from tersor.grids.sampling import Sampler
from tersor.grids.schedule import Frontier, zipar_passes
from tersor.grids.zipar.decoding import Decoder, Trial

pytestmark = pytest.mark.usefixtures("poison_empty")
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
        monkeypatch.setattr(Trial, "verify", lambda self, p, g: honest(self, self.distribution * 0 + p.flip(-1), g))
    ids = torch.zeros(DRAWS, PREFIX, dtype=torch.long)
    prefix = Prefix.padded(ids[..., None].float(), torch.ones_like(ids, dtype=torch.bool), ids)
    sampler = Sampler([], True, torch.Generator().manual_seed(2))
    frontier = Frontier(grid, 1, "eol", adaptive=True)
    done = Decoder(Batch(), prefix, frontier, sampler, DynamicCache(), eol_id=9).run()
    assert wrong != "none" or done.row_start_pass == [1, 4], "in a batch of 20,000 someone rejects"
    statistic = chi_square(done.ids[:, grid.offset(1, 0)], exact_law(LAWS))
    assert (statistic < 1) == (wrong == "none")


@pytest.fixture
def spy(monkeypatch):
    """Record the arguments and results of every forward of a case's adapter."""

    def watch(case):
        calls, adapter = [], find_adapter(case.model)
        original = adapter.logits

        def logits(self, embeddings, positions, mask, cache, keep):
            result = original(self, embeddings, positions, mask, cache, keep)
            calls.append((embeddings, positions.expand(embeddings.shape[:2]), mask, keep, result))
            return result

        monkeypatch.setattr(adapter, "logits", logits)
        return calls

    return watch


def teacher_error(case, calls) -> float:
    """Largest difference to one forward without a cache over everything that was fed.

    Token j is visible to query i iff j's position is not above i's, j was fed no later, and nothing was fed in its
    place by then.
    """
    lengths = [call[0].shape[1] for call in calls]
    fed = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
    embeddings = torch.cat([call[0] for call in calls], dim=1)
    positions = torch.cat([call[1] for call in calls], dim=1)
    prefix = lengths[0]
    stale_from = torch.full_like(fed, len(calls))
    for j in range(prefix, len(fed)):
        later = [fed[i] for i in range(j + 1, len(fed)) if positions[0, i] == positions[0, j]]
        stale_from[j] = later[0] if later else stale_from[j]
    visible = positions[:, None, :] <= positions[:, :, None]
    visible &= (fed[None, :] <= fed[:, None]) & (stale_from[None, :] > fed[:, None])
    # The prefix as it was masked in the first call: padding and order within it.
    visible[:, :prefix, :prefix] = calls[0][2][:, 0, :, :prefix] == 0
    valid = visible[:, prefix - 1, :prefix]
    visible[:, prefix:, :prefix] = valid[:, None]
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]
    model = copy.deepcopy(case.model)
    if case.name == "imagegpt":
        for block in model.transformer.h:  # more tokens at once than the model ever holds, proxies included
            block.attn.bias = torch.ones(1, 1, len(fed), len(fed), dtype=torch.bool).tril()
    adapter = find_adapter(model)(model)
    with torch.no_grad():
        full = adapter.logits(embeddings, positions, mask, DynamicCache(), list(range(len(fed))))
    worst, start = 0.0, 0
    for length, (*_, keep, logits) in zip(lengths, calls, strict=True):
        worst = max(worst, (full[:, [start + each for each in keep]] - logits).abs().max().item())
        start += length
    return worst


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "options", [{"window_size": 2}, {"window_size": 1, "adaptive": True}], ids=["fixed", "adaptive"]
)
def test_one_forward_without_a_cache_gives_the_same_logits(case, spy, guidance, options) -> None:
    calls = spy(case)
    case.zipar(case.inputs(3, case.pads), guidance, **options)
    recorded = list(calls)
    assert teacher_error(case, recorded) < 2e-5


def test_eager_rows_pass_the_same_check(cases, spy) -> None:
    case = cases("llama")
    calls = spy(case)
    case.zipar(case.inputs(3, True), window_size=2, row_start="eager")
    assert teacher_error(case, list(calls)) < 2e-5


@pytest.mark.parametrize("name", ["llama", "emu3", "imagegpt", "llamagen_class"])
def test_the_check_notices_a_mask_that_shows_lower_rows(cases, spy, monkeypatch, name) -> None:
    case, honest = cases(name), Slots.feed
    calls = spy(case)
    monkeypatch.setattr(Slots, "feed", lambda *call: honest(*call) * 0)
    case.zipar(case.inputs(1, False), window_size=2)
    assert teacher_error(case, list(calls)) > 1e-3


@pytest.mark.parametrize("name", ["llama", "janus", "llamagen_class"])
def test_the_check_notices_stale_proxies(cases, spy, monkeypatch, name) -> None:
    case, honest = cases(name), Slots.feed
    calls = spy(case)

    def beside(self, offsets, listed, dtype):
        for each in set(listed) & set(self.slot_of):
            self.slot_of[-1 - len(self.slot_of)] = self.slot_of.pop(each)
        return honest(self, offsets, listed, dtype)

    monkeypatch.setattr(Slots, "feed", beside)
    monkeypatch.setattr("tersor.grids.raster.decoding.max_fed_tokens", lambda grid: 2 * grid.length)
    case.zipar(case.inputs(1, False), window_size=2)
    assert teacher_error(case, list(calls)) > 1e-3


class Force:
    """A processor that leaves one token to one cell, found by the length of what precedes it."""

    def __init__(self, length: int, token: int) -> None:
        self.length, self.token = length, token

    def __call__(self, ids, scores):
        if ids.shape[1] != self.length:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = 0
        return forced


def forced_scores(case, row: int, window: int, tokens: tuple[int, int]) -> list[torch.Tensor]:
    """Scores ``[batch, rows, columns, vocabulary]`` with one or the other token in the first cell of ``row``."""
    inputs = case.inputs(2, False)
    seen = 0 if find_adapter(case.model).own_vocabulary else inputs["input_ids"].shape[1]
    length = seen + RasterGrid(*case.grid, end_of_row=case.end_of_row).offset(row, 0)
    both = []
    for token in tokens:
        out = case.zipar(inputs, window_size=window, output_scores=True, logits_processor=[Force(length, token)])
        both.append(torch.stack(out.scores, dim=1).unflatten(1, case.grid))
    return both


def two_tokens(case) -> tuple[int, int]:
    allowed = find_adapter(case.model)(case.model).allowed_ids
    return (allowed[3], allowed[7]) if allowed else (3, 7)


def test_upper_rows_never_see_lower_ones(case) -> None:
    one, other = forced_scores(case, 1, 1, two_tokens(case))
    finite = torch.isfinite(one) & torch.isfinite(other)
    change = torch.where(finite, one - other, 0.0).abs().amax((0, 3))
    assert change[0].max() == 0, "not a bit of row 0 may depend on row 1"
    assert change[1, 1:].min() > 1e-6, "the cells after it do"


@pytest.mark.parametrize("name", ["llama_eol", "emu3"])
def test_that_check_notices_a_mask_that_shows_everything(cases, monkeypatch, name) -> None:
    honest = Slots.feed
    monkeypatch.setattr(Slots, "feed", lambda *call: honest(*call) * 0)
    case = cases(name)
    one, other = forced_scores(case, 1, 1, two_tokens(case))
    assert (one - other)[:, 0].nan_to_num().abs().max() > 1e-6


@pytest.mark.parametrize("name", ["llama_eol", "emu3"])
def test_batched_guidance_is_two_runs_combined(cases, monkeypatch, name) -> None:
    case = cases(name)
    inputs = case.inputs(2, True)
    negative = {"negative_prompt_ids": inputs["input_ids"][:, -3:]}
    together = case.zipar(inputs, 3.0, window_size=2, output_scores=True, **negative)
    adapter = find_adapter(case.model)
    original = adapter.logits
    caches = DynamicCache(), DynamicCache()

    def apart(self, embeddings, positions, mask, cache, keep):
        original(self, embeddings, positions, mask, cache, keep)
        for each in caches:
            each.layer_class_to_replicate = partial(SlotLayer, cache.layers[0].slots)
        masks = mask.expand(len(embeddings), -1, -1, -1).chunk(2)
        halves = zip(embeddings.chunk(2), positions.chunk(2), masks, caches, strict=True)
        conditional, unconditional = (original(self, *half, keep).log_softmax(-1) for half in halves)
        mixed = unconditional + 3.0 * (conditional - unconditional)
        # Equal halves: the decoder's own combination then leaves them as they are.
        return torch.cat([mixed, mixed])

    monkeypatch.setattr(adapter, "logits", apart)
    by_hand = case.zipar(inputs, 3.0, window_size=2, output_scores=True, **negative)
    assert torch.equal(together.sequences, by_hand.sequences)
    for one, other in zip(together.scores, by_hand.scores, strict=True):
        torch.testing.assert_close(one.log_softmax(-1), other.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_a_scale_of_one_is_no_guidance(case, spy) -> None:
    calls = spy(case)
    inputs = case.inputs(2, False)
    plain = case.zipar(inputs, 1.0, window_size=2)
    assert all(call[0].shape[0] == 2 for call in calls)
    guided = case.zipar(inputs, 3.0, window_size=2)
    assert calls[-1][0].shape[0] == 4
    assert not torch.equal(plain.sequences, guided.sequences) or case.name == "imagegpt"
