"""The demos with few samples and rounds, so that a test may run them, and what holds for each of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor.bench.records import Record, read_jsonl
from tersor.cli import run
from tersor.drag import demo as draganything
from tersor.experts import demo as experts
from tersor.experts.bench import quality, routing
from tersor.grids.nar import demo as nar
from tersor.grids.zipar import demo as zipar
from tersor.kv.demos import minicache, zipcache, zipvl
from tersor.opening import demo as opening
from tersor.opening.intjudge import demo as intjudge
from tersor.ptq import demo as ptq
from tersor.ptq.bench import speed as ptq_speed
from tersor.ptq.networks import RepNetConfig
from tersor.rl import demo as zipr1

#: What a demo takes many of, and how many a test takes.
FEW = {
    zipcache: {"SAMPLES_PER_TASK": 2, "CONTINUATIONS": 2},
    minicache: {"SAMPLES_PER_TASK": 2, "CONTINUATIONS": 2},
    zipvl: {"SAMPLES_PER_KIND": 1},
    zipar: {"SAMPLES": 10, "ROUNDS": 1},
    nar: {"SAMPLES": 10, "CLIP_SAMPLES": 10, "ROUNDS": 1},
    ptq: {"PHOTOS": 1, "FIRST": 8, "ITERATIONS": 1, "ROUNDS": 1},
    experts: {"PROMPTS": 8, "REQUESTS": 8},
    zipr1: {"SAMPLES_PER_KIND": 1, "ROUNDS": 1},
    opening: {"ROUNDS": 1},
    intjudge: {"BATTLES": 6},
    draganything: {"SCENES": 4, "PASSES": 2},
}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples in every demo."""
    for demo, settings in FEW.items():
        for name, value in settings.items():
            monkeypatch.setattr(demo, name, value)
    for row, distilled in quality.ROWS.items():
        if "distill" in distilled:
            monkeypatch.setitem(quality.ROWS, row, {**distilled, "distill_steps": 2})
    monkeypatch.setattr(routing, "training_requests", lambda honest=routing.training_requests: honest(400))
    tiny = RepNetConfig(stem=8, widths=(8,), depths=(1,), strides=(2,), image_size=32)
    monkeypatch.setitem(ptq_speed.SHAPES, "repvgg_a0", tiny)


def run_demo(system: str, monkeypatch: pytest.MonkeyPatch, out: Path) -> tuple[list[Record], str]:
    """Records and page of the demo of ``system`` with few samples.

    Every demo gives records under its own name and command, one of them at least with a verdict, and a page that shows
    something and loads nothing from elsewhere.
    """
    shrink(monkeypatch)
    assert run(["demo", "--only", system, "--out", str(out)]) == 0
    records = read_jsonl(out / "records.jsonl")
    assert {(each.system, each.command) for each in records} == {(system, f"tersor demo --only {system}")}
    assert any(each.verdict for each in records)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<svg" in page or "data:image/" in page
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page
    return records, page
