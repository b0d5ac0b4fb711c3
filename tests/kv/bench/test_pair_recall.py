"""The pair-recall task, and the order of the metrics that the paper claims on it."""

from __future__ import annotations

import pytest
import torch

from tersor import zoo
from tersor.kv.bench.contenders import FULL, pick
from tersor.kv.bench.pair_recall import (
    CONTEXT,
    FIRST_KEY,
    FIRST_VALUE,
    KEYS,
    PAIRS,
    SEPARATOR,
    VALUES,
    VOCABULARY,
    pair_samples,
    score_pairs,
)


def test_every_question_has_its_pair_in_the_context() -> None:
    for row in pair_samples(20, seed=3).tolist():
        assert row[CONTEXT] == SEPARATOR
        facts = {token // VALUES: token % VALUES for token in row[:CONTEXT] if token < KEYS * VALUES}
        assert len(facts) == PAIRS
        asked = dict(zip(row[CONTEXT + 1 :: 2], row[CONTEXT + 2 :: 2], strict=True))
        assert {key - FIRST_KEY: value - FIRST_VALUE for key, value in asked.items()} == facts
        assert max(row) < VOCABULARY


def test_samples_are_a_function_of_seed_and_row() -> None:
    assert torch.equal(pair_samples(3, seed=1), pair_samples(5, seed=1)[:3])
    assert not torch.equal(pair_samples(3, seed=1), pair_samples(3, seed=2))


def test_tiny_recall_has_no_tokenizer_and_says_so() -> None:
    with pytest.raises(ValueError, match="load_model"):
        zoo.load("tiny-recall")


def test_metrics_stand_in_the_papers_order() -> None:
    """4 bits for 40 % of the tokens, the rest evicted; 2,048 questions that no training step has seen."""
    metrics = ("normalized", "accumulated", "recent", "random")
    rivals = pick([f"4/0 40% {metric}" for metric in metrics] + ["uniform 4-bit"])
    scores = score_pairs(zoo.load_model("tiny-recall"), rivals, n=128, seed=77)
    assert scores[FULL].mean().value > 0.98
    assert abs(scores["uniform 4-bit"].against(scores[FULL]).value) < 0.005
    normalized = scores["4/0 40% normalized"]
    for metric in metrics[1:]:
        assert normalized.against(scores[f"4/0 40% {metric}"]).low > 0.03
    assert scores["uniform 4-bit"].against(normalized).value > 0.2
