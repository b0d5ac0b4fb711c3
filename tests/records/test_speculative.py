"""What docs/speculative.md says must follow from the committed records."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor.bench.records import Record, read_jsonl

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
OURS, RASTER = "speculative 28", "raster"


def known(name: str) -> dict[tuple[str, str], Record]:
    return {(record.item, record.quantity): record for record in read_jsonl(RESULTS / f"{name}.jsonl")}


def test_three_hundred_images_are_rasters_in_a_sixth_of_the_passes() -> None:
    found = known("speculative_paired")
    one = f"{OURS}: batch 1"
    assert found[one, "images equal to raster's"].measured == 1
    assert found[one, "images equal to raster's"].n >= 300
    assert found[one, "forward passes"].measured <= 32
    assert found[one, "speed-up over raster"].measured >= 3


@pytest.mark.parametrize("quantity", ["class accuracy", "Fréchet distance", "nats an image"])
def test_what_is_drawn_is_raster_by_every_figure(quantity) -> None:
    found = known("speculative")
    assert found[f"{OURS}: samples", quantity].measured == found[f"{RASTER}: samples", quantity].measured
    assert found["window 4: samples", quantity].measured != found[f"{RASTER}: samples", quantity].measured


@pytest.mark.parametrize("name", ["speculative", "speculative_bfloat16", "speculative_float16"])
def test_the_law_mode_draws_images_that_are_as_probable_as_rasters(name) -> None:
    found = known(name)
    raster, law = (found[f"{each}: samples", "nats an image"] for each in (RASTER, f"law {OURS}"))
    assert law.low is not None and law.high is not None and raster.low is not None and raster.high is not None
    assert law.low <= raster.high and raster.low <= law.high
