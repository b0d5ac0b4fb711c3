"""RepAPQ's demo: verdicts by faked agreement and faked times."""

from __future__ import annotations

import pytest

from tersor.ptq import demo
from tersor.ptq.bench.accuracy import OURS, Run


def run_of(same: int) -> Run:
    hits = [1] * same + [0] * (100 - same)
    return Run(hits, hits, 0.0, 1.0)


@pytest.mark.parametrize(
    ("ours", "peer", "verdict"),
    [(100, 60, "holds"), (95, 60, "holds"), (94, 60, "partly"), (97, 97, "fails"), (50, 60, "fails")],
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
