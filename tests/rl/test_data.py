"""Questions from files: what is read, and what is refused by name before a training starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from zipr1 import MODEL, data, drawn

from tersor import zoo
from tersor.rl.data import check_prompts, load_questions


def write(folder: Path, *rows: Any, text: str | None = None) -> str:
    """A JSONL of ``rows`` beside a picture ``a.png`` and a file that is none."""
    drawn(1)[0]["images"][0].save(folder / "a.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) if text is None else text)
    return str(file)


def test_rows_of_a_file_are_read_with_their_pictures(tmp_path: Path) -> None:
    found = load_questions(
        write(
            tmp_path,
            {"image": "a.png", "question": "color red", "answer": "blue"},
            {"images": ["a.png", "a.png"], "prompt": [{"role": "user", "content": "which?"}], "answer": ["a", "b"]},
            {"question": "no picture", "answer": 3},
        )
    )
    assert found["answer"][:] == [["blue"], ["a", "b"], ["3"]]
    assert [len(each) for each in found["images"]] == [1, 2, 0]
    assert found[0]["images"][0].size == (64, 64)
    assert found[1]["prompt"] == [{"role": "user", "content": "which?"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "a.png", "answer": "x"}], "line 1 has no 'question'"),
        ([{"image": "a.png", "question": " ", "answer": "x"}], "line 1 has no 'question'"),
        ([{"image": "a.png", "prompt": [{"content": "x"}], "answer": "x"}], "line 1 has no 'question'"),
        ([{"image": "a.png", "question": "x"}], "line 1 has no 'answer'"),
        ([{"image": "a.png", "question": "x", "answer": []}], "line 1 has no 'answer'"),
        ([{"image": "a.png", "question": "x", "answer": {"a": 1}}], "line 1 has no 'answer'"),
        (
            [{"question": "x", "answer": "y"}, {"image": "b.png", "question": "x", "answer": "y"}],
            "line 2: no such picture",
        ),
        ([{"image": "broken.png", "question": "x", "answer": "y"}], "line 1: .*is no picture that can be read"),
        ([{"image": 3, "question": "x", "answer": "y"}], "line 1: 'image' must name a file"),
        ([["x"]], "line 1 is no object"),
        ([], "holds no questions"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_questions(write(tmp_path, *rows))


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        load_questions(write(tmp_path, text='{"question": "x", "answer": "y"}\nnothing'))
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_questions(str(tmp_path / "rows.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--data"):
        load_questions(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="--data no/such"):
        load_questions("no/such")


def test_a_data_set_that_was_saved_is_read(tmp_path: Path) -> None:
    data(3).save_to_disk(str(tmp_path / "set"))
    found = load_questions(str(tmp_path / "set"))
    assert found["answer"][:] == data(3)["answer"][:]
    Dataset.from_dict({"question": ["x"]}).save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="row 0 has no 'answer'"):
        load_questions(str(tmp_path / "bare"))
    DatasetDict({"train": data(3)}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"several splits \(train\)"):
        load_questions(str(tmp_path / "splits"))


def test_prompts_that_would_be_read_densely_are_named() -> None:
    processor = zoo.load_processor(MODEL)
    assert check_prompts(data(3), processor, 64) == 69
    with pytest.raises(ValueError, match=r"row 0: the prompt has 69 tokens.*below min_tokens=256"):
        check_prompts(data(3), processor, 256)
