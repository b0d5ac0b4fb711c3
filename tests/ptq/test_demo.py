"""RepAPQ's demo: verdicts by faked agreement and faked times."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from small_demos import run_demo

from tersor.bench.measure import PairedTimes
from tersor.ptq import demo
from tersor.ptq.bench.accuracy import OURS, Run
from tersor.ptq.bench.speed import FLOAT, INTEGER


def run_of(same: int) -> Run:
    hits = [1] * same + [0] * (100 - same)
    return Run(hits, hits, 0.0, 1.0)


@pytest.mark.parametrize(
    ("ours", "peer", "verdict"),
    [(100, 60, "holds"), (95, 60, "too few to tell"), (80, 60, "fails"), (100, 100, "partly"), (50, 60, "fails")],
)
def test_eight_bits_must_agree_and_be_ahead(ours: int, peer: int, verdict: str) -> None:
    found = {("w8a8", OURS): run_of(ours), ("w8a8", demo.PEER): run_of(peer)}
    record = demo._quality_record("w8a8", found)
    assert record.verdict == verdict
    assert (record.measured, record.peer, record.peer_name) == (ours / 100, peer / 100, demo.PEER)


def test_fewer_bits_carry_no_claim() -> None:
    found = {("w4a4", OURS): run_of(80), ("w4a4", "min-max"): run_of(20)}
    record = demo._quality_record("w4a4", found)
    assert record.verdict is record.claim is record.claim_source is None and record.peer_name == "min-max"


@pytest.mark.parametrize(("seconds", "verdict"), [(2.5, "holds"), (2.0, "partly"), (0.9, "fails")])
def test_a_faked_time_turns_the_verdict(seconds: float, verdict: str) -> None:
    times = PairedTimes({FLOAT: (seconds,) * 3, INTEGER: (1.0,) * 3})
    timing = SimpleNamespace(times=times, exact=SimpleNamespace(nbytes=400), integer=SimpleNamespace(nbytes=100))
    speed, size = demo._speed_records(timing)
    assert (speed.verdict, speed.measured, size.measured) == (verdict, seconds, 0.25)


def test_the_demo_quantizes_and_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, page = run_demo("ptq", monkeypatch, tmp_path)
    quality = [each for each in found if each.unit != "x" and each.quantity != "file size"]
    assert len(quality) == len(demo.SHOWN)
    (size,) = [each.measured for each in found if each.quantity == "file size"]
    assert 0 < size < 1
    assert all(name in page for names in demo.SHOWN.values() for name in names)
