"""Which tokens a selection picks, and that padding and ties do not change it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.kv.selection.base import Waiting
from tersor.kv.selection.probes import ProbeScores
from tersor.kv.selection.ratio import RandomSelection, RecentSelection, SaliencySelection


def waiting(sums: Tensor, *, valid: Tensor | None = None, counts: Tensor | None = None) -> Waiting:
    batch, scopes, tokens = sums.shape
    counts = torch.ones(batch, tokens) if counts is None else counts
    return Waiting(torch.zeros(batch, max(scopes, 1), tokens, 4), valid, ProbeScores(sums, counts), layer=0, segment=0)


def test_the_largest_scores_are_important_and_counts_match_the_authors() -> None:
    sums = torch.tensor([[[5.0, 1, 4, 2, 3]]])
    for ratio in (0.1, 0.3, 0.5, 0.6, 0.9):
        important, regular = SaliencySelection(ratio=ratio).choose(waiting(sums))
        assert regular.index.shape[-1] == int((1 - ratio) * 5)
        picked = sums[0, 0, important.index[0, 0]]
        assert picked.min() > sums[0, 0, regular.index[0, 0]].max() if regular.index.numel() else True
        both = torch.cat([important.index, regular.index], -1).sort(-1).values
        assert both.tolist() == [[[0, 1, 2, 3, 4]]]


def test_order_is_ascending_and_ties_keep_the_earlier_token() -> None:
    important, regular = SaliencySelection(ratio=0.5).choose(waiting(torch.ones(1, 1, 6)))
    assert important.index.tolist() == [[[0, 1, 2]]]
    assert regular.index.tolist() == [[[3, 4, 5]]]


@pytest.mark.parametrize(
    "selection",
    [SaliencySelection(ratio=0.5), RecentSelection(ratio=0.5), RandomSelection(ratio=0.5, seed=3)],
)
def test_padding_is_in_no_group_and_changes_no_choice(selection) -> None:
    generator = torch.Generator().manual_seed(0)
    sums = torch.rand(2, 1, 12, generator=generator)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, :5] = False
    together = selection.choose(waiting(sums, valid=valid))
    alone = selection.choose(waiting(sums[1:, :, 5:]))
    for padded, single in zip(together, alone, strict=True):
        slots = padded.valid[1, 0] if padded.valid is not None else torch.ones(padded.index.shape[-1], dtype=torch.bool)
        assert torch.equal(padded.index[1, 0, slots] - 5, single.index[0, 0])


def test_normalization_variants() -> None:
    sums, counts = torch.tensor([[[4.0, 3, 2, 1]]]), torch.tensor([[8.0, 4, 2, 2]])

    def scores(name: str) -> list[float]:
        return SaliencySelection(ratio=0.5, normalization=name).scores(waiting(sums, counts=counts))[0, 0].tolist()  # type: ignore[arg-type]

    assert scores("probe_nnz") == [0.5, 0.75, 1.0, 0.5]
    assert scores("full_nnz") == [1.0, 1.0, 1.0, 1.0]
    assert scores("none") == [4, 3, 2, 1]


def test_without_scores_small_keys_rank_first() -> None:
    state = waiting(torch.zeros(1, 1, 4))
    state.scores = ProbeScores()
    state.keys = torch.tensor([3.0, 1, 2, 4]).reshape(1, 1, 4, 1)
    important, _ = SaliencySelection(ratio=0.5).choose(state)
    assert important.index.tolist() == [[[1, 2]]]


def test_probe_rows_follow_the_ratios() -> None:
    rows = SaliencySelection(ratio=0.6).probe_rows(1000, layer=0, segment=0)
    assert len(rows) == 100
    assert rows[-50:].tolist() == list(range(950, 1000))
    assert len(SaliencySelection(ratio=0.6, max_probe_tokens=20).probe_rows(1000, layer=0, segment=0)) == 20
    assert SaliencySelection(ratio=0.6).probe_rows(7, layer=0, segment=0).tolist() == [6]
    everything = SaliencySelection(ratio=0.6, probe_recent_ratio=1.0, probe_random_ratio=0.0)
    assert len(everything.probe_rows(64, layer=0, segment=0)) == 64


@pytest.mark.parametrize(("policy", "steps"), [("all", 100), ("paper", 10), ("last", 1)])
def test_decode_probes(policy: str, steps: int) -> None:
    selection = SaliencySelection(ratio=0.6, decode_probe=policy)  # type: ignore[arg-type]
    chosen = [step for step in range(100) if selection.probes_step(step, 100, layer=0, segment=1)]
    assert len(chosen) == steps
    assert chosen[-1] == 99


def test_random_choice_depends_on_seed_layer_and_segment_only() -> None:
    def pick(seed: int, layer: int = 0, segment: int = 0) -> list[int]:
        state = waiting(torch.zeros(1, 1, 40))
        state.layer, state.segment = layer, segment
        return RandomSelection(ratio=0.5, seed=seed).choose(state)[0].index.flatten().tolist()

    assert pick(1) == pick(1)
    assert len({tuple(pick(*key)) for key in [(1,), (2,), (1, 1), (1, 0, 1)]}) == 4
