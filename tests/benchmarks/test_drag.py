"""The table of DragAnything's ablation says what its records say."""

from __future__ import annotations

import dataclasses

from pages import drag

from tersor.bench.records import read_jsonl
from tersor.drag.bench.arms import ARMS


def test_the_ablation_has_a_row_for_every_arm_and_each_figure_follows_its_record() -> None:
    records = read_jsonl(drag.RESULTS / "drag.jsonl")
    rows = {line.split(" | ")[0].strip("| "): line for line in drag.arms_table(records).splitlines() if " | " in line}
    assert {*ARMS, "the true video", "still picture", "no control"} <= {*rows}
    for arm in ARMS:
        changed = [
            dataclasses.replace(each, measured=7.77, low=7.0, high=8.0) if each.item.startswith(f"{arm}: ") else each
            for each in records
        ]
        (row,) = (line for line in drag.arms_table(changed).splitlines() if line.startswith(f"| {arm} |"))
        assert row.count("7.77") == row.count("|") - 2, row
