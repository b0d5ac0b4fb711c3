"""Answers of models: all variations that exist are read, and what is written is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tersor._errors import TersorError
from tersor.opening.data import read_data
from tersor.opening.outputs import Answer, finished, model_folder, model_name, read_outputs, write_output
from tersor.opening.records import Step
from tersor.opening.scenes import draw


@pytest.fixture
def instances(mini_root):
    return read_data(mini_root).instances


@pytest.fixture
def folder(tmp_path) -> Path:
    made = model_folder(tmp_path, "Model")
    made.mkdir()
    return made


def write(folder: Path, name: str, steps: list, **keys) -> None:
    record = {"conversations": [{"input": []}, {"output": steps}], **keys}
    (folder / name).write_text(json.dumps(record, indent=4))


def picture(folder: Path, name: str, kind: str = "JPEG") -> None:
    Image.new("RGB", (8, 8)).save(folder / name, kind)


def test_every_variation_of_an_answer_is_read(folder, instances) -> None:
    uids = [each.uid for each in instances]
    picture(folder, f"{uids[0]}-o-0.jpg", "PNG")
    for number, name in enumerate((f"{uids[0]}-o-0.jpg", f"./Model_output/{uids[0]}-o-0.jpg")):
        write(folder, f"{uids[number]}.json", [{"image": name, "text": "Step <image>"}])
    write(folder, f"{uids[2]}.jsonl", [{"text": "alone", "image": None}], total_uid=uids[2])
    write(folder, f"{uids[3]}.json", [])
    write(folder, "other.json", [{"text": "named inside", "image": None}], total_uid=uids[4])
    write(folder, "9999999.json", [])
    found = read_outputs(folder, uids)
    image = folder / f"{uids[0]}-o-0.jpg"
    assert found.model == "Model"
    assert found.answers[uids[0]] == found.answers[uids[1]] == (Step("Step", image),)
    assert found.answers[uids[2]] == (Step("alone"),)
    assert found.answers[uids[3]] == ()
    assert found.answers[uids[4]] == (Step("named inside"),)
    assert found.unknown == ["9999999"]
    assert found.problems == []


def test_a_broken_picture_is_left_out_with_a_word_or_refused(folder, instances) -> None:
    uid = instances[0].uid
    write(folder, f"{uid}.json", [{"text": "t", "image": "gone.jpg"}, {"text": "u", "image": "../"}])
    found = read_outputs(folder, [uid])
    assert found.answers[uid] == (Step("t"), Step("u"))
    assert ["is missing" in str(each) for each in found.problems] == [True, True]
    assert read_outputs(folder, [uid], strict=True).answers == {}


def test_files_that_are_no_answers_are_named(folder, instances) -> None:
    for name, text in (("1.json", "{"), ("2.json", "[]"), ("3.json", '{"conversations": []}')):
        (folder / name).write_text(text)
    found = read_outputs(folder, ["1", "2", "3"])
    assert found.answers == {}
    assert [each.level for each in found.problems] == ["error"] * 3
    for wrong in (folder / "nothing", folder.parent):
        with pytest.raises(TersorError):
            read_outputs(wrong, [])


@pytest.mark.parametrize("name", ["a/b", "..", "C#+ (x)", "Größe", "a%2Fb", "a\\b:c*", ".hidden", "A B"])
def test_any_name_gets_a_folder_of_its_own_and_comes_back(tmp_path, name) -> None:
    folder = model_folder(tmp_path, name)
    assert folder.parent == tmp_path
    folder.mkdir()
    assert model_name(folder) == name
    with pytest.raises(TersorError, match="1 to 100"):
        model_folder(tmp_path, " ")


def test_an_answer_counts_when_its_file_and_every_picture_are_whole(folder, instances) -> None:
    instance = instances[0]
    assert finished(folder, instance.uid) is None
    steps = write_output(folder, instance, Answer((("one", draw({})), ("two", None))))
    assert finished(folder, instance.uid) == steps == read_outputs(folder, [instance.uid]).answers[instance.uid]
    image = steps[0].image
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    assert finished(folder, instance.uid) is None
    image.write_bytes(whole)
    file = folder / f"{instance.uid}.json"
    file.write_text(file.read_text()[:100])
    assert finished(folder, instance.uid) is None


def test_the_fingerprint_sees_texts_and_pictures(folder, instances) -> None:
    uid = instances[0].uid

    def fingerprint() -> str:
        return read_outputs(folder, [uid]).hashes[uid]

    steps = write_output(folder, instances[0], Answer((("one", draw({})),)))
    before = fingerprint()
    assert fingerprint() == before
    picture(folder, steps[0].image.name)
    after = fingerprint()
    write_output(folder, instances[0], Answer((("two", draw({})),)))
    assert len({before, after, fingerprint()}) == 3
