"""Invariants 5 and 6: the probe estimate and what normalization is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.kv.engine.call import causal_rows
from tersor.kv.selection.probes import (
    KEPT_STEPS,
    ProbeScores,
    Queries,
    normalized_saliency,
    probe_positions,
    seeded_generator,
)


def attention_matrix(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """The whole causal matrix, averaged over query heads: ``[batch, kv_heads, length, length]``."""
    group = query.shape[1] // keys.shape[1]
    scores = query @ keys.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    closed = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(closed, -torch.inf).softmax(-1).unflatten(1, (-1, group)).mean(2)


def draw(batch: int = 2, heads: int = 4, kv_heads: int = 2, length: int = 37, dim: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, heads, length, dim, generator=generator), torch.randn(
        batch, kv_heads, length, dim, generator=generator
    )


def probe_score(query: Tensor, keys: Tensor, rows: Tensor, normalize) -> Tensor:
    length = keys.shape[2]
    allowed = causal_rows(length, length, keys.device)[:, rows]
    sums = Queries(query, 0.3).sums(keys, rows, None)
    counts = allowed.sum(1).float().expand(keys.shape[0], -1)
    return normalize(sums, counts)


def check_all_rows_give_the_full_score(normalize) -> None:
    query, keys = draw()
    length = keys.shape[2]
    matrix = attention_matrix(query, keys, 0.3)
    expected = matrix.sum(-2) / torch.arange(length, 0, -1)
    torch.testing.assert_close(probe_score(query, keys, torch.arange(length), normalize), expected)


def test_all_rows_as_probes_equal_the_full_normalized_score() -> None:
    check_all_rows_give_the_full_score(normalized_saliency)


def test_a_column_seen_by_one_row_works() -> None:
    query, keys = draw(length=5)
    score = probe_score(query, keys, torch.tensor([4]), normalized_saliency)
    torch.testing.assert_close(score, attention_matrix(query, keys, 0.3)[:, :, 4])


@pytest.mark.parametrize("broken", [lambda sums, counts: sums, lambda sums, counts: sums / counts.amax()])
def test_the_full_score_catches_a_missing_normalization(broken) -> None:
    with pytest.raises(AssertionError):
        check_all_rows_give_the_full_score(broken)


def test_uniform_attention_is_flatter_when_normalized() -> None:
    length = 50
    matrix = torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]
    accumulated, counts = matrix.sum(0), torch.arange(length, 0, -1.0)
    normalized = normalized_saliency(accumulated[None, None], counts[None])[0, 0]
    assert (accumulated.diff() < 0).all()
    expected = torch.stack([(1 / torch.arange(i + 1.0, length + 1)).mean() for i in range(length)])
    torch.testing.assert_close(normalized, expected)
    assert normalized.max() / normalized.min() < 0.2 * accumulated.max() / accumulated.min()


def check_rank_ignores_position(score) -> None:
    """A token that draws a constant share ``w`` of every row that sees it outranks the rest wherever it stands."""
    length, w = 60, 0.3
    for special in range(1, length - 1):
        matrix = torch.ones(length, length).tril()
        matrix /= matrix.sum(-1, keepdim=True)
        sees = torch.arange(length) >= special
        matrix[sees] *= 1 - w
        matrix[sees, special] += w
        sums, counts = matrix.sum(0)[None, None], torch.arange(length, 0, -1.0)[None]
        value = score(sums, counts)[0, 0]
        # The first tokens hold most of their own short rows under any metric, and are left out.
        assert value[special] >= value[3:].max()


def test_normalized_rank_does_not_depend_on_position() -> None:
    check_rank_ignores_position(normalized_saliency)


def test_accumulated_rank_does() -> None:
    with pytest.raises(AssertionError):
        check_rank_ignores_position(lambda sums, counts: sums)


def test_probe_rows_are_recent_plus_random_without_replacement() -> None:
    rows = probe_positions(200, 10, 10, seeded_generator(0, 1, 2, 200))
    assert len(rows) == len(set(rows.tolist())) == 20
    assert rows[-10:].tolist() == list(range(190, 200))
    assert (rows.diff() > 0).all()
    assert torch.equal(rows, probe_positions(200, 10, 10, seeded_generator(0, 1, 2, 200)))
    assert not torch.equal(rows, probe_positions(200, 10, 10, seeded_generator(0, 2, 2, 200)))
    assert probe_positions(1, 0, 0, seeded_generator(0)).tolist() == [0]


def test_the_global_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    probe_positions(100, 5, 5, seeded_generator(0))
    assert torch.equal(before, torch.get_rng_state())


def fed(rows: list[Tensor], slots: int = 16) -> ProbeScores:
    """Scores that got the attention ``rows`` of single steps, each over the tokens up to its own."""
    scores = ProbeScores()
    for place, given in enumerate(rows):
        steps = scores.room(torch.zeros(1, 1, 0, 4), 1, slots, 1)
        row, fold = scores.claim(place)
        if fold:
            steps[:, 0] += steps[:, row]
        steps[:, row] = 0.0
        steps[:, row, 0, : place + 1], steps[:, row, 1, : place + 1] = given, 1.0
    return scores


def some_rows(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(n + 1, generator=generator) for n in range(count)]


def assert_same(got: tuple[Tensor, Tensor] | None, expected: tuple[Tensor, Tensor] | None) -> None:
    assert got is not None and expected is not None
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("removed", [1, 3, KEPT_STEPS])
def test_scores_of_steps_add_up_and_crop_leaves_no_trace(removed: int) -> None:
    rows = some_rows(12)
    scores, plain = fed(rows), fed(rows[: 12 - removed])
    scores.keep_columns(0, 12 - removed)
    assert_same(scores.totals(12 - removed), plain.totals(12 - removed))
    sums, counts = scores.totals(12 - removed)  # type: ignore[misc]
    assert counts.tolist() == [[*range(12 - removed, 0, -1)]]
    by_hand = sum(torch.nn.functional.pad(row, (0, 12 - removed - len(row))) for row in rows[: 12 - removed])
    torch.testing.assert_close(sums[0, 0], by_hand)


def test_steps_go_on_after_a_crop() -> None:
    rows = some_rows(30)
    scores = fed(rows[:12])
    scores.keep_columns(0, 9)
    for place in range(9, 30):
        steps = scores.room(torch.zeros(1, 1, 0, 4), 1, 32, 1)
        row, fold = scores.claim(place)
        if fold:
            steps[:, 0] += steps[:, row]
        steps[:, row] = 0.0
        steps[:, row, 0, : place + 1], steps[:, row, 1, : place + 1] = rows[place], 1.0
    plain = fed(rows, slots=32)
    assert_same(scores.totals(30), plain.totals(30))
    assert sorted(scores.kept) == [*range(30 - KEPT_STEPS, 30)]


def test_what_is_compressed_leaves_the_scores_of_the_rest() -> None:
    rows = some_rows(12)
    scores = fed(rows)
    sums, counts = scores.totals(12)  # type: ignore[misc]
    scores.keep_columns(7, 12)
    assert_same(scores.totals(5), (sums[..., 7:], counts[..., 7:]))
    scores.keep_columns(5, 5)
    assert not bool(scores.totals(16)[0].any())  # type: ignore[index]


def test_more_drafts_than_are_kept_apart_get_rows_of_their_own() -> None:
    scores = fed(some_rows(4))
    scores.room(torch.zeros(1, 1, 0, 4), 1, 16, KEPT_STEPS + 5)
    rows = [scores.claim(4 + place) for place in range(KEPT_STEPS + 1)]
    assert len({row for row, _ in rows}) == KEPT_STEPS + 1
    assert scores.kept.count(-1) == KEPT_STEPS + 5 - len(set(scores.kept)) + 1


def test_long_updates_and_steps_share_one_total() -> None:
    scores = fed([torch.ones(n + 1) for n in range(7)])
    assert scores.steps is not None
    scores.add_sums(torch.ones(1, 1, 4), torch.full((1, 4), 2.0))
    scores.add_sums(torch.ones(1, 1, 6), torch.full((1, 6), 3.0))
    sums, counts = scores.totals(7)  # type: ignore[misc]
    assert sums.tolist() == [[[9, 8, 7, 6, 4, 3, 1]]]
    assert counts.tolist() == [[12, 11, 10, 9, 6, 5, 1]]
    assert ProbeScores().totals(3) is None
