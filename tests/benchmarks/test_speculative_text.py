"""Speculative decoding of text: few texts, which are those of generate."""

from __future__ import annotations

from pathlib import Path

import speculative_text

from tersor.bench.records import read_jsonl


def test_passes_are_counted_and_texts_compared(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    records = speculative_text.main(["--texts", "2", "--tokens", "12", "--out", str(out)])
    assert read_jsonl(out) == records
    by_quantity = {quantity: [each for each in records if each.quantity == quantity] for quantity in
                   ("forward passes", "texts equal to generate's")}  # fmt: skip
    assert all(0 < each.measured <= each.baseline == 12 for each in by_quantity["forward passes"])
    assert [each.measured for each in by_quantity["texts equal to generate's"]] == [1, 1]
