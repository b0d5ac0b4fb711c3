"""Peers that evict keep the tokens that their papers keep."""

from __future__ import annotations

import torch

from tersor.kv.bench.peers.h2o import HeavyHitterSelection
from tersor.kv.bench.peers.snapkv import SnapSelection
from tersor.kv.bench.peers.streaming_llm import SinkSelection
from tersor.kv.selection.base import Waiting
from tersor.kv.selection.probes import ProbeScores


def waiting_tokens(sums: torch.Tensor, *, segment: int = 0, valid: torch.Tensor | None = None) -> Waiting:
    """Tokens with the accumulated attention ``sums`` ``[kv_heads, tokens]``."""
    heads, tokens = sums.shape
    scores = ProbeScores(sums[None], torch.ones(1, tokens))
    return Waiting(torch.zeros(1, heads, tokens, 4), valid, scores, layer=0, segment=segment)


def kept(selection, waiting: Waiting) -> list[list[int]]:
    chosen = selection.choose(waiting)[0]
    return [own[real].tolist() for own, real in zip(chosen.index[0], chosen.slots[0], strict=True)]


def test_streaming_llm_keeps_sinks_and_the_newest() -> None:
    selection = SinkSelection(ratio=0.5, sinks=2)
    assert kept(selection, waiting_tokens(torch.zeros(1, 10))) == [[0, 1, 7, 8, 9]]
    # Sinks are the first tokens of the sequence, not of every segment, and not the padding before them.
    assert kept(selection, waiting_tokens(torch.zeros(1, 10), segment=1)) == [[5, 6, 7, 8, 9]]
    valid = torch.tensor([[False] * 2 + [True] * 8])
    assert kept(selection, waiting_tokens(torch.zeros(1, 10), valid=valid)) == [[2, 3, 8, 9]]


def test_h2o_keeps_the_newest_and_the_heavy_of_each_head() -> None:
    sums = torch.zeros(2, 12)
    sums[0, [1, 3, 5]], sums[1, [0, 2, 4]] = 1.0, 1.0
    assert kept(HeavyHitterSelection(ratio=0.5), waiting_tokens(sums)) == [[1, 3, 5, 9, 10, 11], [0, 2, 4, 9, 10, 11]]
    assert HeavyHitterSelection(ratio=0.5).probe_rows(7, layer=0, segment=0).tolist() == list(range(7))


def test_snapkv_pools_over_neighbours_and_keeps_its_window() -> None:
    sums = torch.zeros(2, 20)
    sums[0, 4], sums[1, 9] = 1.0, 1.0
    selection = SnapSelection(ratio=0.25, window=2, kernel=3)
    assert kept(selection, waiting_tokens(sums)) == [[3, 4, 5, 18, 19], [8, 9, 10, 18, 19]]
    assert selection.probe_rows(20, layer=0, segment=0).tolist() == [18, 19]
    assert not selection.probes_step(99, 100, layer=0, segment=1)
