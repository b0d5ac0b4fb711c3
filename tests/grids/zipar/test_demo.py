"""ZipAR's demo: passes by the schedule, images being decoded, and what may be lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import run_demo

from tersor.bench.measure import Estimate
from tersor.grids.zipar.demo import judge_loss


def test_zipar_shows_images_and_judges_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records, page = run_demo("zipar", monkeypatch, tmp_path)
    assert (records[0].claim, records[0].measured, records[0].baseline) == (713, 713, 8190)
    assert [record.peer_name for record in records if record.unit == "x"] == ["if time were passes"] * 4
    assert "2 of 2 images equal to raster's" in records[-1].item
    # One for each pass; the adaptive window takes as many as it needs.
    assert page.count("<animate ") > 196 + 136 + 52 + 10
    assert page.count("data:image/png;base64,") == 10


@pytest.mark.parametrize(("value", "high", "verdict"), [(-1, 1, "holds"), (-3, -1, "partly"), (-9, -5, "fails")])
def test_zipar_may_lose_two_points(value: float, high: float, verdict: str) -> None:
    assert judge_loss(Estimate(value, value - 1, high, "95% bootstrap")) == verdict
