"""A user's texts, cut into pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.kv.tune.pieces import LEAST, cut, halves, read_texts

START = 256


class Bytes:
    """A tokenizer of bytes that begins a text with `START`, if it is told to."""

    def __init__(self, start: bool) -> None:
        self.start, self.bos_token_id = start, START

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [START] * (self.start and add_special_tokens) + list(text.encode())}


def test_a_text_file_is_one_text_and_jsonl_has_one_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n"}\n\n{"text": "two", "more": 1}\n', encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one\n\ntwo\n"]
    assert read_texts(tmp_path / "a.jsonl") == ["one\n", "two"]


ROWS = {"no JSON": "{", "no text": '{"prompt": "x"}', "a list": "[1]", "no string": '{"text": 4}'}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_without_a_text_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "one"}}\n{ROWS[name]}\n', encoding="utf-8")
    with pytest.raises(ValueError, match='line 2 must be an object with a "text"'):
        read_texts(file)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_texts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_texts(tmp_path / "a.txt")


def test_pieces_follow_each_other_and_none_crosses_the_end_of_a_text() -> None:
    texts = ["abcdefg" * 4, "short", "0123456789" * 2]
    pieces = cut(texts, Bytes(start=False), 5)
    assert [bytes(each).decode() for each in pieces.tolist()] == [
        *("abcde", "fgabc", "defga", "bcdef", "gabcd", "short", "01234", "56789", "01234", "56789"),
    ]  # fmt: skip


def test_every_piece_begins_as_the_tokenizer_begins_a_text() -> None:
    pieces = cut(["abcd" * 8], Bytes(start=True), 5)
    assert [(each[0], bytes(each[1:]).decode()) for each in pieces.tolist()] == [(START, "abcd")] * 8


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="holds 3 pieces of 5 tokens, and it takes 8; give more text, or shorter"):
        cut(["abcdefghijklmnopq", "abcd"], Bytes(start=False), 5)


def test_halves_are_drawn_by_the_seed_and_share_no_piece() -> None:
    pieces = torch.arange(21)[:, None]
    first, second = halves(pieces, 12, 3)
    assert len(first) == len(second) == 6
    assert len({*first.flatten().tolist(), *second.flatten().tolist()}) == 12
    assert all(torch.equal(a, b) for a, b in zip((first, second), halves(pieces, 12, 3), strict=True))
    assert not torch.equal(first, halves(pieces, 12, 4)[0])
    assert [len(each) for each in halves(pieces, 64, 0)] == [10, 10]
    assert [len(each) for each in halves(pieces, LEAST + 1, 0)] == [LEAST // 2, LEAST // 2]
