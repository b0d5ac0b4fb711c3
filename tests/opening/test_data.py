"""Files of instances: every bad input is named with its line and field, none is guessed at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tersor._errors import TersorError
from tersor.opening.data import read_data, write_data
from tersor.opening.mini import write_mini


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Half of opening-mini."""
    folder = tmp_path_factory.mktemp("half")
    write_mini(folder, each=1)
    return folder


@pytest.fixture
def root(template, tmp_path) -> Path:
    shutil.copytree(template, tmp_path / "data")
    return tmp_path / "data"


def changed(root: Path, change, line: int = 1) -> Path:
    """The data with one record changed."""
    file = root / "test_data.jsonl"
    lines = file.read_text().splitlines()
    record = json.loads(lines[line - 1])
    result = change(record)
    lines[line - 1] = json.dumps(record) if result is None else result
    file.write_text("\n".join(lines) + "\n")
    return file


def put(*path, value):
    def change(record):
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return change


BAD = {
    "no JSON": (lambda record: "{nonsense", "", "is no JSON"),
    "a list": (lambda record: "[1]", "", "must be a JSON object"),
    "no uid": (lambda record: record.pop("total_uid") and None, "total_uid", "is missing"),
    "uid a number": (put("total_uid", value=7), "total_uid", "must be a text"),
    "uid a path": (put("total_uid", value="../x"), "total_uid", "must be letters"),
    "id no digits": (put("subtask_id", value="x1"), "subtask_id", "must be digits"),
    "no conversations": (put("conversations", value={}), "conversations", "must be a list"),
    "no input": (put("conversations", 0, value={"in": []}), "conversations.input", "must be a list"),
    "empty input": (put("conversations", 0, "input", value=[]), "conversations.input", "has no step"),
    "text a number": (put("conversations", 1, "output", 0, "text", value=1), "conversations.output[0].text", "a text"),
    "image a number": (
        put("conversations", 1, "output", 0, "image", value=1), "conversations.output[0].image", "a path or null",
    ),
    "step a text": (put("conversations", 0, "input", 0, value="x"), "conversations.input[0]", "must be an object"),
    "path up": (
        put("conversations", 0, "input", 0, "image", value="../../passwd"), "conversations.input[0].image", "leads out",
    ),
    "path absolute": (
        put("conversations", 0, "input", 0, "image", value="/etc/passwd"), "conversations.input[0].image", "leads out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named_by_line_and_field(root, name) -> None:
    change, field, said = BAD[name]
    file = changed(root, change, line=3)
    with pytest.raises(TersorError) as error:
        read_data(root)
    assert f"{file}:3: {field + ': ' if field else ''}" in str(error.value)
    assert said in str(error.value)
    found = read_data(root, skip_bad=True)
    assert len(found.instances) == 22
    assert [each.where for each in found.errors] == [f"{file}:3"] * len(found.errors)


def test_all_problems_are_counted(root) -> None:
    changed(root, lambda record: "{", line=1)
    changed(root, lambda record: "{", line=2)
    with pytest.raises(TersorError, match=r"and 1 more.*--skip-bad"):
        read_data(root)


def test_a_second_copy_is_a_warning_and_a_second_meaning_an_error(root) -> None:
    file = root / "test_data.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[0]]))
    found = read_data(root)
    assert len(found.instances) == 23
    assert [each.level for each in found.problems] == ["warning"]
    changed(root, put("subtask_name", value="other"), line=24)
    with pytest.raises(TersorError, match="already in line 1 with other content"):
        read_data(root)


def test_a_uid_that_does_not_fit_its_ids_is_kept_with_a_warning(root) -> None:
    changed(root, put("total_uid", value="9999999"))
    found = read_data(root)
    assert found.instances[0].uid == "9999999"
    assert "does not fit the ids" in str(found.problems[0])


def pictures(root: Path) -> Path:
    return sorted((root / "images").rglob("*-o-1.jpg"))[0]


BROKEN = {
    "missing": (lambda file: file.unlink(), "is missing"),
    "empty": (lambda file: file.write_bytes(b""), "no picture"),
    "half": (lambda file: file.write_bytes(file.read_bytes()[:700]), "no picture"),
    "bomb": (lambda file: Image.new("1", (12_000, 9_000)).save(file, "PNG"), "too many pixels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_step_goes_without_a_broken_picture_unless_strict(root, name) -> None:
    spoil, said = BROKEN[name]
    spoil(pictures(root))
    found = read_data(root)
    assert [said in each.what for each in found.problems] == [True]
    assert sum(step.image is None for each in found.instances for step in each.gold) == 1
    with pytest.raises(TersorError, match=said):
        read_data(root, strict=True)


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "P", "I;16"])
def test_pictures_of_other_kinds_are_fine(root, mode) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"  # a .jpg that is a PNG: the bytes count, not the name
    Image.new(mode, (20, 20)).save(pictures(root), kind)
    assert read_data(root).problems == []


def test_a_link_that_leads_out_is_refused(root, tmp_path) -> None:
    picture = pictures(root)
    outside = tmp_path / "outside.jpg"
    picture.rename(outside)
    picture.symlink_to(outside)
    with pytest.raises(TersorError, match="leads out of"):
        read_data(root)


def test_marks_are_not_shown_and_groups_go_by_number(root) -> None:
    changed(root, put("meta_task_name", value="Storry writing"))
    found = read_data(root).instances
    assert all("<" not in step.text for each in found for step in (*each.inputs, *each.gold))
    assert found[0].task == "01.01"


def test_what_is_written_is_read_again(root) -> None:
    before = read_data(root).instances
    write_data(root, before, "dev_data.jsonl")
    assert read_data(root / "dev_data.jsonl").instances == before


def test_folders_without_data_and_files_of_nothing_are_refused(tmp_path) -> None:
    with pytest.raises(TersorError, match="holds neither"):
        read_data(tmp_path)
    (tmp_path / "test_data.jsonl").write_text("\n")
    with pytest.raises(TersorError, match="holds no instance"):
        read_data(tmp_path)
    (tmp_path / "test_data.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(TersorError, match="no text in UTF-8"):
        read_data(tmp_path)
