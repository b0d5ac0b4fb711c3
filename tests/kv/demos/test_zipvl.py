"""ZipVL's demo shows what each layer keeps, and its verdicts follow from the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import run_demo

from tersor.kv.bench.vision import DENSE, Outcome
from tersor.kv.demos import zipvl
from tersor.kv.demos.zipvl import FIXED, ONCE, PAPER, RANDOM, SPARSER, STORED


def outcome(right: int) -> Outcome:
    """``right`` of 200 answers to both questions, from half of the tokens."""
    answers = [1.0] * right + [0.0] * (200 - right)
    return Outcome(
        first=answers,
        second=answers,
        kinds=["look"] * 200,
        ratios=[0.5] * 200,
        flops=150.0,
        kv_bytes=100,
        dense_bytes=400,
    )


def records(**right: int) -> list:
    """Of 200 right answers of dense attention."""
    given = {DENSE: 200, PAPER: 200, RANDOM: 120, SPARSER: 190, f"{FIXED}, as {SPARSER}": 195, STORED: 200, ONCE: 150}
    return zipvl._records({name: outcome(right.get(name, hits)) for name, hits in given.items()})


@pytest.mark.parametrize(
    ("ours", "random", "verdict"),
    [(200, 120, "holds"), (199, 120, "holds"), (200, 200, "partly"), (198, 120, "partly"), (180, 120, "fails")],
)
def test_the_headline_must_lose_little_and_random_tokens_more(ours: int, random: int, verdict: str) -> None:
    first = records(**{PAPER: ours, RANDOM: random})[0]
    assert (first.verdict, first.measured, first.peer) == (verdict, (ours - 200) / 2, (random - 200) / 2)
    assert first.item.endswith("every layer sparse as in the paper") and first.claim == -0.2


@pytest.mark.parametrize(
    ("ours", "fixed", "verdict"), [(200, 190, "holds"), (200, 200, "partly"), (190, 195, "fails"), (150, 100, "fails")]
)
def test_a_fixed_share_stands_beside_the_adaptive_one_whoever_wins(ours: int, fixed: int, verdict: str) -> None:
    second = records(**{SPARSER: ours, f"{FIXED}, as {SPARSER}": fixed})[1]
    assert (second.verdict, second.peer, second.peer_name) == (verdict, (fixed - 200) / 2, FIXED)


def test_zipvl_shows_what_each_layer_keeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, page = run_demo("zipvl", monkeypatch, tmp_path)
    assert found[0].peer_name == "random tokens, as many a layer"
    kept = next(record for record in found if record.quantity == "tokens in attention")
    assert 0 < kept.measured < 1
    assert page.count("layer 0:") == 2
