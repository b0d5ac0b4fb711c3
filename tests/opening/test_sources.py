"""Pairs of other benchmarks come in whole: answers, who met, who won."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from tersor._errors import TersorError
from tersor.cli import run
from tersor.opening.data import read_data
from tersor.opening.official import Row, write_rows
from tersor.opening.outputs import Answer, model_folder, write_output
from tersor.opening.records import Step
from tersor.opening.sources import MMRB2Pairs, OpeningPairs, take_pairs
from tersor.opening.store import Store


def pair(number: int, a: str, b: str, chosen: str) -> dict:
    return {
        "pair_id": f"p{number}", "prompt_source": "sourceB" if number else "sourceA",
        "prompt_content": [["text", "Show this twice."], ["image", "input_images/in.png"]],
        "response_a": {"model": a, "response_content": [["image", "images/1.png"], ["text", "one"], ["text", "two"],
                                                        ["image", "images/1.png"]]},
        "response_b": {"model": b, "response_content": [["text", "x"]]}, "chosen": chosen,
    }  # fmt: skip


@pytest.fixture
def file(tmp_path):
    for name in ("input_images/in.png", "images/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    pairs = [pair(0, "x", "y", "A"), pair(1, "y", "z", "B"), pair(2, "x", "x", "A")]
    (tmp_path / "interleaved.json").write_text(json.dumps({"pairs": pairs}))
    return tmp_path / "interleaved.json"


def test_pairs_of_mmrb2_are_read_whole(file) -> None:
    found = MMRB2Pairs().read(file)
    image = file.parent / "images" / "1.png"
    assert [each.task for each in found.instances] == ["03.01", "03.02"]
    assert found.instances[0].inputs == (Step("Show this twice.", file.parent / "input_images" / "in.png"),)
    assert found.answers["x"]["03010001"] == (Step("", image), Step("one"), Step("two", image))
    assert found.rows == [Row("03010001", "x", "y", "A"), Row("03020002", "y", "z", "B")]
    assert ["on both sides" in str(each) for each in found.problems] == [True]


def test_a_run_is_made_of_them(file, tmp_path) -> None:
    name = tmp_path / "run"
    for _ in range(2):
        assert run(["opening", "init", str(name), "--from", str(file), "--format", "mmrb2"]) == 0
    with Store.open(name) as store:
        assert store.models() == ["x", "y", "z"]
        assert [(each.a, each.b, each.label) for each in store.verdicts("human:mmrb2")] == [
            ("x", "y", "A"),
            ("y", "z", "B"),
        ]
        assert [len(each) for each in store.outputs("x").values()] == [3]


@pytest.mark.parametrize("text", ["[]", '{"pairs": [{}]}', '{"pairs": [{"prompt_content": 5, "chosen": "C"}]}'])
def test_other_files_are_refused_by_name(tmp_path, text) -> None:
    (tmp_path / "t2i.json").write_text(text)
    with pytest.raises(TersorError, match=r"t2i\.json"):
        MMRB2Pairs().read(tmp_path / "t2i.json")


def test_a_picture_that_leads_out_is_refused_and_a_missing_one_left_out(file) -> None:
    pairs = json.loads(file.read_text())
    pairs["pairs"][0]["prompt_content"][1][1] = "gone.png"
    file.write_text(json.dumps(pairs))
    found = MMRB2Pairs().read(file)
    assert found.instances[0].inputs == (Step("Show this twice."),)
    pairs["pairs"][0]["prompt_content"][1][1] = "../x.png"
    file.write_text(json.dumps(pairs))
    with pytest.raises(TersorError, match="leads out"):
        MMRB2Pairs().read(file)


def test_openings_own_layout_is_a_source_too(mini_root, tmp_path, store) -> None:
    shutil.copytree(mini_root, tmp_path / "data")
    instances = read_data(tmp_path / "data").instances
    for model in ("x", "y"):
        for instance in instances[:2]:
            write_output(model_folder(tmp_path / "data", model), instance, Answer((("hello", None),)))
    rows = [Row(instances[0].uid, "y", "x", "Tie(A)"), Row(instances[1].uid, "x", "y")]
    write_rows(tmp_path / "rows.json", rows, {})
    source = OpeningPairs(tmp_path / "rows.json")
    found = source.read(tmp_path / "data")
    assert found.answers["x"][instances[0].uid] == (Step("hello"),)
    take_pairs(store, source, found)
    assert [(each.a, each.label) for each in store.verdicts("human:opening")] == [("y", "Tie(A)")]
    assert len(store.battles()) == 2
