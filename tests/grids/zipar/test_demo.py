"""ZipAR's demo: passes by the schedule, images being decoded, and what may be lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_demos import run_demo

from tersor.bench.measure import PairedTimes
from tersor.grids.samples import Quality, Samples
from tersor.grids.zipar import demo
from tersor.grids.zipar.bench.quality import Drawn, Speed


def test_zipar_shows_images_and_judges_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records, page = run_demo("zipar", monkeypatch, tmp_path)
    assert (records[0].claim, records[0].measured, records[0].baseline) == (713, 713, 8190)
    assert [record.peer_name for record in records if record.unit == "x"] == ["if time were passes"] * 4
    assert "2 of 2 images equal to raster's" in records[-1].item
    # One for each pass; the adaptive window takes as many as it needs.
    assert page.count("<animate ") > 196 + 136 + 52 + 10
    assert page.count("data:image/png;base64,") == 10


def records(right: dict[str, int], seconds: float = 1.0, *, other: bool = False) -> list:
    """Of 300 images of each decoding, all of raster's right; raster takes 2 ``seconds`` and everything else one.

    All draw the same images, but the speculative one where ``other`` is asked for.
    """
    names, tested = (demo.RASTER, "window 9", "adaptive 4", "window 2"), f"speculative {demo.TESTED}"
    qualities = {
        name: Quality([Samples([1] * hits + [0] * (300 - hits), 1.0, 1.0, [98])])
        for name, hits in zip(names, (300, *right.values()), strict=True)
    }
    ids = {name: torch.zeros(1, 14, 14, dtype=torch.int64) for name in (*names, tested)}
    if other:
        ids[tested][0, 0, 0] = 1
    drawn = {name: [Drawn(each, [[196 if name == demo.RASTER else 98]], 196)] * 4 for name, each in ids.items()}
    times = PairedTimes({name: ((2.0 * seconds if name == demo.RASTER else 1.0),) * 3 for name in ids})
    return demo._records(qualities, Speed(times, drawn))


@pytest.mark.parametrize(
    ("ours", "small", "verdict"),
    [
        (300, 150, "holds"),
        (299, 150, "holds"),
        (300, 300, "partly"),
        (294, 150, "too few to tell"),
        (180, 150, "fails"),
    ],
)
def test_two_points_may_be_lost_and_a_window_too_small_must_lose_more(ours: int, small: int, verdict: str) -> None:
    record = records({"window 9": ours, "adaptive 4": 300, "window 2": small})[1]
    assert (record.verdict, record.measured) == (verdict, pytest.approx((ours - 300) / 3))
    assert record.peer == pytest.approx((small - 300) / 3)


@pytest.mark.parametrize(("seconds", "verdict"), [(1.0, "holds"), (0.7, "partly"), (0.4, "fails")])
def test_a_faked_time_turns_the_verdict(seconds: float, verdict: str) -> None:
    """Half of the passes; at least four fifths of that must be there in time."""
    found = records({"window 9": 300, "adaptive 4": 300, "window 2": 300}, seconds)[3:6]
    assert [record.verdict for record in found] == [verdict] * 3 and found[0].measured == 2 * seconds


@pytest.mark.parametrize(
    ("seconds", "other", "verdict"),
    [(1.5, False, "holds"), (1.0, False, "partly"), (0.5, False, "fails"), (1.5, True, "fails")],
)
def test_speculative_decoding_must_be_fast_and_draw_the_same_images(seconds: float, other: bool, verdict: str) -> None:
    right = {"window 9": 300, "adaptive 4": 300, "window 2": 300}
    assert records(right, seconds, other=other)[-1].verdict == verdict


def test_a_schedule_of_more_passes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "zipar_passes", lambda *grid: 714)
    assert records({"window 9": 300, "adaptive 4": 300, "window 2": 300})[0].verdict == "fails"
