"""Walks over nested dataclasses, lists and tuples of tensors."""

from __future__ import annotations

import torch

from tersor.kv.engine.tree import iter_tensors, map_tensors
from tersor.kv.selection.base import Chosen
from tersor.kv.selection.probes import ProbeScores


def test_a_tensor_held_twice_stays_shared() -> None:
    shared = torch.arange(3)
    mapped = map_tensors([shared, (Chosen(shared, None), 7), "word"], lambda x: x + 1)
    assert mapped[0].tolist() == [1, 2, 3]
    assert mapped[1][0].index is mapped[0]
    assert mapped[1][1:] == (7,)
    assert mapped[2] == "word"
    assert shared.tolist() == [0, 1, 2]


def test_every_tensor_has_a_path() -> None:
    scores = ProbeScores(torch.zeros(1), None, torch.ones(2), [0, -1])
    named = dict(iter_tensors((scores, torch.ones(4)), "layer"))
    assert {path: len(x) for path, x in named.items()} == {
        "layer.0.sums": 1,
        "layer.0.steps": 2,
        "layer.1": 4,
    }
