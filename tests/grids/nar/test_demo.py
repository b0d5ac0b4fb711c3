"""NAR's demo: passes by the schedule, and verdicts by faked losses and times."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import run_demo

from tersor.bench.measure import Estimate, PairedTimes, wilson_interval
from tersor.grids.nar import demo
from tersor.grids.nar.bench.quality import NAR, RASTER, Speed
from tersor.grids.nar.demo import _caption_record, _passes, _quality_record, _speed_record, judge_loss
from tersor.grids.samples import Quality, Samples


def test_the_published_grid_takes_the_published_passes() -> None:
    record = _passes()
    assert (record.claim, record.measured, record.baseline, record.verdict) == (31.0, 31.0, 256.0, "holds")


def test_a_schedule_of_more_passes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "front_count", lambda grid: 32)
    assert (_passes().verdict, _passes().measured) == ("fails", 32.0)


@pytest.mark.parametrize(
    ("low", "high", "ahead", "verdict"),
    [
        (-3, 0, None, "holds"), (-3, 0, (-2, 1), "holds"), (-3, 0, (-2, -1), "partly"),
        (-4, -2, None, "too few to tell"), (-9, -5, None, "fails"),
    ],
)  # fmt: skip
def test_three_points_may_be_lost_and_par_may_not_be_clearly_better(
    low: float, high: float, ahead: tuple[float, float] | None, verdict: str
) -> None:
    other = None if ahead is None else Estimate(ahead[0], *ahead, "95% bootstrap")
    assert judge_loss(Estimate(low, low, high, "95% bootstrap"), other, 100) == verdict


@pytest.mark.parametrize(("right", "verdict"), [(100, "holds"), (97, "too few to tell"), (60, "fails")])
def test_a_faked_loss_turns_the_verdict(right: int, verdict: str) -> None:
    def quality(hits: int) -> Quality:
        return Quality([Samples([1] * hits + [0] * (100 - hits), 1.0, 1.0, [27])])

    record = _quality_record("tiny-nar", {NAR: quality(right), RASTER: quality(100)})
    assert record.verdict == verdict and record.measured == right - 100 and record.n == 100


@pytest.mark.parametrize(("seconds", "verdict"), [(7.0, "holds"), (3.0, "partly"), (0.9, "fails")])
def test_a_faked_time_turns_the_verdict(seconds: float, verdict: str) -> None:
    """Raster takes seven times as many passes; at least four fifths of that must be there in time."""
    times = PairedTimes({NAR: (1.0, 1.0, 1.0), RASTER: (seconds, seconds, seconds)})
    record = _speed_record("tiny-nar", Speed(1, {NAR: 28, RASTER: 196}, times), RASTER)
    assert record.verdict == verdict and record.measured == seconds and record.peer == 7.0


@pytest.mark.parametrize(("right", "verdict"), [(38, "holds"), (6, "too few to tell"), (0, "too few to tell")])
def test_captions_must_be_clear_of_chance(right: int, verdict: str) -> None:
    record = _caption_record(wilson_interval(right, 100) * 100, wilson_interval(4, 100) * 100)
    assert record.verdict == verdict and record.measured == right and record.baseline == pytest.approx(4.0)


def test_the_demo_measures_images_clips_and_captions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, page = run_demo("nar", monkeypatch, tmp_path)
    records = {(record.model, record.quantity): record for record in found}
    assert records["ImageNet's grid", "forward passes"].measured == 31
    for name, others in (("tiny-nar", ("raster", "PAR-4X")), ("tiny-nar-video", ("raster",))):
        assert records[name, "class accuracy against raster"].n == 10
        for other in others:
            record = records[name, f"samples a second against {other}"]
            assert record.peer == {"raster": 196, "PAR-4X": 52}[other] / {"tiny-nar": 27, "tiny-nar-video": 16}[name]
    assert records["tiny-nar-text", "all three as asked"].verdict != "partly"
    assert page.count("<figure") == 2
