"""The planted model computes the same and minds its values; rows of other runs stay in the file."""

from __future__ import annotations

from pathlib import Path

import kv_tune
import pytest
import torch
from pages import tune as page

from tersor import zoo
from tersor.bench.records import read_jsonl
from tersor.kv.tune.losses import measure
from tersor.kv.tune.pieces import cut
from tersor.kv.tune.singles import uniform


def test_the_planted_model_computes_the_same_and_its_values_need_more_bits() -> None:
    model, tokenizer = zoo.load("tiny-lm")
    planted = kv_tune.with_common_values(model, 5)
    pieces = cut([zoo.book()[:4000]], tokenizer, 400)[:2]
    with torch.inference_mode():
        torch.testing.assert_close(planted(pieces).logits, model(pieces).logits, rtol=1e-3, atol=1e-3)
    rest = tuple(each for each in range(8) if each != 5)
    recipe = {"values": uniform(8, 2, skip_layers=rest)}
    before, after = (measure(each, pieces, recipe, lambda _: None)["values"].mean for each in (model, planted))
    assert after > 50 * before


@pytest.mark.slow
def test_a_run_replaces_its_own_rows_and_makes_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_tune, "TOKENS", 256)
    out = tmp_path / "tune.jsonl"
    words = ["--pieces", "8", "--samples", "1", "--threads", "1", "--out", str(out)]
    for budget in ("4", "5", "4"):
        assert kv_tune.main([*words, "--budget", budget]) == 0
    records = read_jsonl(out)
    groups = page.grouped(records)
    assert list(groups) == [("tiny-lm", "4x"), ("tiny-lm", "5x")]
    assert sum(each.quantity == "time" for each in records) == 2
    assert page.settings_table(groups).count("**") == 4
    assert page.widths_table(groups).count("tiny-lm") == 2
