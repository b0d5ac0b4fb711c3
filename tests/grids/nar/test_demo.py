"""NAR's demo with few samples."""

from __future__ import annotations

import pytest

from tersor.bench.measure import Estimate


def test_the_demo_measures_images_clips_and_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    import tersor.grids.nar.demo as demo

    monkeypatch.setattr(demo, "SAMPLES", 4)
    monkeypatch.setattr(demo, "CLIP_SAMPLES", 4)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    said: list[str] = []
    result = demo.run(said.append)
    records = {(record.model, record.quantity): record for record in result.records}
    assert records["ImageNet's grid", "forward passes"].measured == 31
    for name, others in (("tiny-nar", ("raster", "PAR-4X")), ("tiny-nar-video", ("raster",))):
        assert records[name, "class accuracy against raster"].n == 4
        for other in others:
            record = records[name, f"samples a second against {other}"]
            assert record.peer == {"raster": 196, "PAR-4X": 52}[other] / {"tiny-nar": 27, "tiny-nar-video": 16}[name]
    assert records["tiny-nar-text", "all three as asked"].verdict in ("holds", "fails")
    assert len(result.section.figures) == 2 and any("captions" in each for each in said)


def test_the_demo_judges_by_the_numbers() -> None:
    from tersor.grids.nar.demo import judge_loss

    def estimate(value: float, half: float) -> Estimate:
        return Estimate(value, value - half, value + half, "95% bootstrap")

    assert judge_loss(estimate(-2, 1), None) == "holds"
    assert judge_loss(estimate(-2, 1), -1.5) == "holds"
    assert judge_loss(estimate(-2, 1), -0.5) == "partly", "PAR loses less"
    assert judge_loss(estimate(-5, 3), None) == "partly" and judge_loss(estimate(-9, 3), None) == "fails"
