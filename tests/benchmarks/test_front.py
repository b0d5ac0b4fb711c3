"""The first screen says what the records say, in few rows, the same in README and on the docs' home."""

from __future__ import annotations

import dataclasses
import re

import pytest
from pages import front

from tersor.bench.records import Record

NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


def scaled(file: str, item: str, quantity: str) -> Record:
    """The record as it would be, had another number been measured; each record's is its own."""
    found = front.committed(file, item, quantity)
    assert found.measured is not None
    other = found.measured * (2 + len(item + quantity) / 10)
    return dataclasses.replace(found, measured=other, low=None, high=None, interval=None)


def test_the_table_is_short_and_every_row_leads_to_a_page() -> None:
    rows = front.rows(front.committed)
    assert 5 <= len(rows) <= 10 and all(all(row) for row in rows)
    for _, page, *_ in rows:
        assert (front.ROOT / "docs" / f"{page}.md").is_file()


def test_every_figure_of_the_table_follows_its_record() -> None:
    """Where a cell has figures, other records give others; a difference of nothing stays one."""
    for old, new in zip(front.rows(front.committed), front.rows(scaled), strict=True):
        for before, after in zip(old[3:], new[3:], strict=True):
            if NUMBER.search(before) and not before.startswith("0.0 "):
                assert before != after, (old[0], before)


@pytest.mark.parametrize("part", [front.saved, front.slower])
def test_the_texts_follow_their_records(part) -> None:
    before, after = (NUMBER.findall(part(find, "")) for find in (front.committed, scaled))
    assert len(before) == len(after) and sum(a != b for a, b in zip(before, after, strict=True)) >= 5


def test_a_difference_that_rounds_to_nothing_has_no_sign() -> None:
    record = front.committed("ptq_repvgg", "RepAPQ: w8a8", "accuracy against floating point")
    assert record.measured is not None and record.measured < 0
    assert front.number(record, "+.1f", 100) == "0.0"
    assert front.number(dataclasses.replace(record, measured=-0.022, low=-0.03, high=0.0), "+.1f", 100) == "−2.2"


def test_both_pages_have_all_parts_and_five_doors() -> None:
    assert len(front.DOORS) == 5
    for page in front.FRONT_PAGES:
        text = page.read_text(encoding="utf-8")
        assert {found[2] for found in front._PART.finditer(text)} == set(front.PARTS)
