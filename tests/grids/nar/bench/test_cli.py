"""`tersor bench nar`: records and refusals."""

from __future__ import annotations

import pytest
from invoke import run

from tersor.bench.measure import PairedTimes
from tersor.cli import app
from tersor.grids.nar.bench.cli import EXCESS, caption_records, nar_records
from tersor.grids.nar.bench.quality import (
    NAR,
    RASTER,
    CaptionScores,
    Locked,
    Settings,
    Speed,
)  # fmt: skip
from tersor.grids.samples import Quality, Samples


def quality(*distances: float) -> Quality:
    return Quality([Samples([1, 0, 1, 1], distance, 2 * distance, [7]) for distance in distances])


def test_records_say_what_was_measured() -> None:
    found = {name: (Settings(guidance=1.5), quality(5.0, 7.0)) for name in (NAR, RASTER)}
    times = PairedTimes({NAR: (0.1, 0.1, 0.1), RASTER: (0.4, 0.4, 0.4)})
    speed = Speed(8, {NAR: 7, RASTER: 16}, times)
    floors = {"real": [1.0, 1.0], "reconstructed": [2.0, 2.0], "images": 30}
    facts = Locked(floors, {NAR: 0.5, RASTER: 0.25}, held_out=20)
    records = {
        (record.item, record.quantity): record
        for record in nar_records("m", found, [speed], facts=facts, device="cpu", command="c")
    }
    loss = records["NAR: real samples", "held-out loss"]
    assert (loss.measured, loss.baseline, loss.n) == (0.5, 0.25, 20)
    assert records["NAR: samples", "guidance"].measured == 1.5
    assert records["NAR: samples", EXCESS].measured == pytest.approx(1)
    assert records["NAR: samples", "class accuracy"].measured == 0.75
    assert records["NAR: samples", "Fréchet joint distance"].measured == 12
    assert records["reconstructed samples: floor", "Fréchet distance"].measured == 2
    assert records["raster: batch 8", "speed-up of NAR"].measured == pytest.approx(4)
    assert records["raster: batch 8", "share of the pass ratio"].measured == pytest.approx(4 * 7 / 16)
    assert records["NAR: batch 8", "samples per second"].measured == pytest.approx(80)
    scores = CaptionScores({"digit": [1, 0]})
    (record,) = caption_records("m", Settings(), scores, CaptionScores({"digit": [0, 0]}), command="c")
    assert (record.measured, record.baseline, record.n) == (0.5, 0.0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1,x"], "whole numbers"), (["--batches", "0"], "whole numbers"),
        (["--model", "tiny-lm"], "one of"),
        (["--samples", "1"], "at least 2"), (["--validation", "1"], "at least 2"), (["--seeds", "0"], "at least 1"),
        (["--samples", "0", "--batches", ""], "nothing to measure"), (["--device", "abacus"], "no torch device"),
        (["--model", "tiny-nar-text", "--device", "meta"], "not for captions"),
        (["--model", "tiny-nar-text", "--samples", "0"], "nothing to measure"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(app, "bench", "nar", *arguments)
