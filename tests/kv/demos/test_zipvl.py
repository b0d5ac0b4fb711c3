"""ZipVL's demo shows what each layer keeps, and its verdicts follow from the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import run_demo

from tersor.kv.bench.vision import DENSE, Outcome
from tersor.kv.demos import zipvl
from tersor.kv.demos.zipvl import FIXED, ONCE, PAPER, RANDOM, SPARSER, STORED


def outcome(right: int) -> Outcome:
    """``right`` of 1,000 answers to both questions, from half of the tokens."""
    answers = [1.0] * right + [0.0] * (1000 - right)
    return Outcome(
        first=answers,
        second=answers,
        kinds=["look"] * 1000,
        ratios=[0.5] * 1000,
        flops=750.0,
        kv_bytes=100,
        dense_bytes=400,
    )


def records(**right: int) -> list:
    """Of 1,000 right answers of dense attention."""
    given = {
        DENSE: 1000,
        PAPER: 1000,
        RANDOM: 600,
        SPARSER: 950,
        f"{FIXED}, as {SPARSER}": 975,
        STORED: 1000,
        ONCE: 750,
    }
    return zipvl._records({name: outcome(right.get(name, hits)) for name, hits in given.items()})


@pytest.mark.parametrize(
    ("ours", "random", "verdict"),
    [
        (1000, 600, "holds"),
        (999, 600, "holds"),
        (1000, 1000, "partly"),
        (996, 600, "too few to tell"),
        (900, 600, "fails"),
    ],
)
def test_the_headline_must_lose_little_and_random_tokens_more(ours: int, random: int, verdict: str) -> None:
    first = records(**{PAPER: ours, RANDOM: random})[0]
    assert (first.verdict, first.measured, first.peer) == (verdict, (ours - 1000) / 10, (random - 1000) / 10)
    assert first.item.endswith("every layer sparse as in the paper") and first.claim == -0.2


@pytest.mark.parametrize(
    ("ours", "fixed", "verdict"),
    [(1000, 950, "holds"), (1000, 1000, "partly"), (950, 975, "fails"), (750, 500, "fails")],
)
def test_a_fixed_share_stands_beside_the_adaptive_one_whoever_wins(ours: int, fixed: int, verdict: str) -> None:
    second = records(**{SPARSER: ours, f"{FIXED}, as {SPARSER}": fixed})[1]
    assert (second.verdict, second.peer, second.peer_name) == (verdict, (fixed - 1000) / 10, FIXED)


def test_zipvl_shows_what_each_layer_keeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, page = run_demo("zipvl", monkeypatch, tmp_path)
    assert found[0].peer_name == "random tokens, as many a layer"
    kept = next(record for record in found if record.quantity == "tokens in attention")
    assert 0 < kept.measured < 1
    assert page.count("layer 0:") == 2
