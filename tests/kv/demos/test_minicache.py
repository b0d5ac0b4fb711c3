"""MiniCache's demo: the pairs that it merges, and figures alone and with ZipCache."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import run_demo

from tersor import zoo
from tersor.kv.bench.contenders import FULL
from tersor.kv.bench.recall import Scores
from tersor.kv.demos import minicache
from tersor.kv.demos.minicache import BOTH, DEEP, OURS, RIVALS
from tersor.kv.depth.pairs import PairedLayer


def scores(right: int, size: int) -> Scores:
    """``right`` of 100 answers, by a cache whose dense form takes 400 bytes."""
    return Scores([1.0] * right + [0.0] * (100 - right), size, 400)


def test_what_is_compared_merges_the_deep_pairs_or_none() -> None:
    config = zoo.load_model(minicache.MODEL).config
    merged = {
        rival.name: [layer.layer_idx for layer in rival.build(config).layers if isinstance(layer, PairedLayer)]
        for rival in minicache.rivals()
    }
    deep = [layer for pair in DEEP for layer in pair]
    assert merged == {FULL: [], **{name: [] for name in RIVALS}, OURS: deep, BOTH: deep}


def test_records_are_of_four_bits_and_of_both_methods() -> None:
    recall = {FULL: scores(100, 400), OURS: scores(99, 80), BOTH: scores(97, 50)}
    recall |= {name: scores(50, 60) for name in RIVALS}
    lost, smaller, _, both_lost, both_smaller = minicache._records(recall, recall)
    assert (lost.measured, lost.claim, lost.peer) == (pytest.approx(-1.0), -0.97, pytest.approx(-3.0))
    assert (lost.peer_name, lost.verdict) == (BOTH, "too few to tell")
    assert (smaller.measured, smaller.claim) == (5.0, 5.02)
    assert (both_lost.measured, both_lost.baseline, both_lost.claim) == (pytest.approx(-3.0), 0.0, None)
    assert (both_smaller.measured, both_smaller.baseline) == (8.0, 1.0)
    assert all(record.system == "minicache" and record.model == "tiny-lm-tied" for record in (lost, both_smaller))


def test_the_demo_measures_merging_alone_and_with_zipcache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, page = run_demo("minicache", monkeypatch, tmp_path)
    sizes = [each.measured for each in found if each.quantity == "compression of a 16-bit cache"]
    assert len(sizes) == 2 and min(sizes) > 1
    assert OURS in page and BOTH in page
