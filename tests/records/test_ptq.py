"""RepAPQ's claims on the committed records: what docs/repapq.md shows must keep saying what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor.bench.records import Record, read_jsonl
from tersor.ptq.bench.accuracy import METHODS, OURS

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PLAIN = ("min-max", "percentile", "squared error of weights")

Known = dict[tuple[str, str], Record]


def read(name: str) -> Known:
    return {(record.item, record.quantity): record for record in read_jsonl(RESULTS / f"{name}.jsonl")}


@pytest.fixture(scope="module", params=["repvgg", "mobileone"])
def known(request) -> Known:
    return read(f"ptq_{request.param}")


def lost(known: Known, name: str, bits: str) -> float:
    """Points of accuracy below floating point."""
    return -100 * known[f"{name}: {bits}", "accuracy against floating point"].measured


def test_all_held_out_images_and_three_seeds(known: Known) -> None:
    assert all(record.n == 10_000 and "3 seeds" in record.shapes for record in known.values())
    compared = {method.name for method in METHODS if method.family != "ablation"}
    assert {item.rpartition(": ")[0] for item, _ in known} >= compared


@pytest.mark.parametrize(("bits", "allowed"), [("w8a8", 0.5), ("w6a6", 1.5), ("w4a4", 5.0)])
def test_little_is_lost(known: Known, bits: str, allowed: float) -> None:
    assert lost(known, OURS, bits) <= allowed


def test_plain_ranges_collapse() -> None:
    """Where identities meet channels that are nearly always zero; MobileOne's blocks collapse with fewer bits alone."""
    repvgg, mobileone = read("ptq_repvgg"), read("ptq_mobileone")
    for name in PLAIN:
        assert lost(repvgg, name, "w8a8") >= 10 and lost(mobileone, name, "w4a4") >= 10
    assert lost(repvgg, "ONNX Runtime", "w8a8") >= 10


def test_no_other_method_is_better_than_ours_by_more_than_noise(known: Known) -> None:
    for bits in ("w8a8", "w6a6", "w4a4"):
        ours = known[f"{OURS}: {bits}", "accuracy"]
        for method in METHODS:
            other = known.get((f"{method.name}: {bits}", "accuracy"))
            if other is not None and method.family != "ablation":
                assert other.measured <= ours.high


def test_each_part_was_removed() -> None:
    """How much each gives is reported, not asserted, but for the start, without which training begins in ruins."""
    parts = read("ptq_parts")
    assert {item.rpartition(": ")[0] for item, _ in parts} >= {m.name for m in METHODS if m.family == "ablation"}
    for bits in ("w6a6", "w4a4"):
        assert lost(parts, "RepAPQ from the weights' range", bits) > lost(parts, OURS, bits)


def test_the_file_is_faster_and_smaller_and_all_integers() -> None:
    """On the processor that the record names; 2.5 is the goal for one with VNNI."""
    speed = read("ptq_speed")
    assert speed["repvgg_a0: batch 1", "speed-up"].low >= 2.5
    for (_, quantity), record in speed.items():
        if quantity == "layers in floating point":
            assert record.measured == 0
        if quantity == "file size":
            assert record.measured <= 0.27


def test_a_large_network_is_calibrated_within_half_an_hour() -> None:
    told = {record.quantity: record.measured for record in read_jsonl(RESULTS / "ptq_calibration.jsonl")}
    assert told["processor time of the whole calibration"] < 30
    assert told["end repeated from a stage border, the same bit for bit (1 yes)"] == 1
