"""The measurements of batches, short."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra serve")

from tersor.experts.bench import serving
from tersor.experts.bench.serving import (
    COMPRESSED,
    CONTINUOUS,
    EVERY,
    STATIC,
    CacheBytes,
    bytes_of_long_prompts,
    exact_answers,
    time_batches,
    time_cold_load,
)


@pytest.mark.slow
def test_every_kind_of_batch_is_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TOKENS", 3)
    times = time_batches(apart=0.001, repeats=2, with_alone=False)
    assert set(times.rounds.samples) == {STATIC, CONTINUOUS, COMPRESSED} == set(times.first)
    for kind, rounds in times.rounds.samples.items():
        assert len(rounds) == len(times.first[kind]) == 2
        assert all(0 < first < whole for first, whole in zip(times.first[kind], rounds, strict=True))


@pytest.mark.slow
def test_answers_are_those_of_the_experts() -> None:
    assert sum(exact_answers(CONTINUOUS, 8, seed=7)) >= 24, "of 32"


@pytest.mark.slow
def test_a_cache_is_counted_where_tokens_are_compressed() -> None:
    short, every = CacheBytes(), CacheBytes()
    exact_answers(COMPRESSED, 4, seed=7, nbytes=short)
    assert sum(exact_answers(EVERY, 8, seed=7, nbytes=every)) >= 24, "of 32"
    assert every.share < 1 < short.share, "short prompts wait in float32"
    assert bytes_of_long_prompts(COMPRESSED, 320).share < 0.5


def test_gaps_are_told_apart_by_whether_an_expert_was_on_its_way() -> None:
    found = time_cold_load("tiny", streams=2, repeats=1, seed=1)
    assert found.during and len(found.otherwise) > len(found.during)
    assert found.nbytes > 0 and 0 < found.seconds < sum(found.otherwise)
