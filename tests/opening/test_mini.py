"""opening-mini is large enough, in the official layout, checkable, and the same each time."""

from __future__ import annotations

import json
from pathlib import Path

from tersor.opening.data import read_data
from tersor.opening.mini import TOPICS, write_mini
from tersor.opening.scenes import faults


def files(root: Path) -> dict[str, bytes]:
    return {str(each.relative_to(root)): each.read_bytes() for each in root.rglob("*") if each.is_file()}


def test_it_has_what_was_promised(mini_root) -> None:
    found = read_data(mini_root)
    assert found.problems == []
    assert len(found.instances) == 46
    assert len({each.task for each in found.instances}) == 23
    assert len({kind for _, kind in TOPICS}) == 10
    assert {len(each.gold) for each in found.instances} == {1, 2, 3, 4}
    with_picture = [any(step.image for step in each.inputs) for each in found.instances]
    assert True in with_picture and False in with_picture
    assert all(faults(each, each.gold) == 0 and faults(each, ()) > 0 for each in found.instances)


def test_the_same_seed_gives_the_same_bytes(mini_root, tmp_path) -> None:
    write_mini(tmp_path / "same")
    write_mini(tmp_path / "other", seed=1)
    assert files(tmp_path / "same") == files(mini_root) != files(tmp_path / "other")


def test_the_layout_is_the_official_one(mini_root) -> None:
    for line in (mini_root / "test_data.jsonl").read_text().splitlines():
        record = json.loads(line)
        given, answer = record["conversations"]
        texts = [step["text"] for step in given["input"]]
        assert sum(text.count("<BEGIN>") for text in texts) == texts[0].count("<BEGIN>") == 1
        for part, steps in (("i", given["input"]), ("o", answer["output"])):
            for number, step in enumerate(steps, 1):
                assert step["text"].count("<image>") == (step["image"] is not None)
                if step["image"] is not None:
                    stem = f"{record['data_id']}-{part}-{number}.jpg"
                    assert step["image"] == f"./images/{record['subtask_name']}/{stem}"
