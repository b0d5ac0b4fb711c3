"""Chosen and waiting tokens: empty slots, padding, and places."""

from __future__ import annotations

import torch

from tersor.kv.selection.base import Chosen, Waiting, choose_among, choose_none, compact
from tersor.kv.selection.probes import ProbeScores

VALID = torch.tensor([[True, True, True, True], [False, False, True, True]])


def test_picked_tokens_ascend_and_empty_slots_go_last() -> None:
    chosen = compact(torch.tensor([[[3, 9, 0]], [[9, 2, 9]]]), 9)
    assert chosen.index[:, 0].tolist() == [[0, 3], [2, 0]]
    assert chosen.valid[:, 0].tolist() == [[True, True], [True, False]]
    assert [row.tolist() for row in chosen.rows()] == [[0, 3], [2]]
    assert compact(torch.tensor([[[1, 0]]]), 9).valid is None


def test_all_are_chosen_but_padding() -> None:
    device = torch.device("cpu")
    assert [row.tolist() for row in choose_among(VALID, [4, 2]).rows()] == [[0, 1, 2, 3], [2, 3]]
    assert choose_among(torch.ones_like(VALID), [4, 4]).valid is None
    assert choose_none(2, device).index.shape == (2, 1, 0)


def test_gathering_follows_the_index_of_each_sample() -> None:
    tokens = torch.arange(8.0).reshape(2, 1, 4, 1)
    chosen = Chosen(torch.tensor([[[0, 3]], [[1, 2]]]), None)
    assert chosen.gather(tokens)[:, 0, :, 0].tolist() == [[0.0, 3.0], [5.0, 6.0]]
    assert bool(chosen.slots.all())


def test_places_count_real_tokens() -> None:
    waiting = Waiting(torch.zeros(2, 1, 4, 2), VALID, ProbeScores(), 0, 0)
    assert waiting.lengths().tolist() == [4, 2]
    assert waiting.places().tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1]]
    important, regular = waiting.all_important()
    assert [len(row) for row in important.rows()] == [4, 2]
    assert regular.index.shape[-1] == 0
