"""MiniCache's demo: merged alone, and with fewer bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import run_demo

from tersor import zoo
from tersor.kv.demos import minicache
from tersor.kv.depth.pairs import PairedLayer


def test_what_is_compared_merges_the_pairs_that_were_trained_alike() -> None:
    config = zoo.load_model(minicache.MODEL).config
    merged = {
        rival.name: [layer.layer_idx for layer in rival.build(config).layers if isinstance(layer, PairedLayer)]
        for rival in minicache.rivals()
    }
    assert merged.pop(minicache.OURS) == merged.pop(minicache.BOTH) == [2, 3, 4, 5, 6, 7]
    assert not any(merged.values())


def test_the_demo_measures_merging_alone_and_with_zipcache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, page = run_demo("minicache", monkeypatch, tmp_path)
    sizes = [each.measured for each in found if each.quantity == "compression of a 16-bit cache"]
    assert len(sizes) == 2 and min(sizes) > 1
    assert minicache.OURS in page and minicache.BOTH in page
