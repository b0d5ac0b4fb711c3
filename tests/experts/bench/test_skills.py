"""The generated tasks of tiny-experts: right answers, held-out prompts, requests in words."""

from __future__ import annotations

import zlib

import pytest
import torch

from tersor.experts.bench.requests import _COMMANDS, _FRAMES, _UNSEEN, _UNSEEN_FRAMES, DESCRIPTIONS, asked
from tersor.experts.bench.skills import CHARACTERS, EOS, MIXTURE, PAD, SKILLS, VOCABULARY, encode, examples, rows_of


def solve(skill: str, prompt: str) -> str:
    """The answer, computed in another way than the generator does."""
    if skill == "add":
        a, b = prompt[:-1].split("+")
        total, carry, digits = 0, 0, []
        for one, other in zip(a, b, strict=True):
            total = int(one) + int(other) + carry
            carry, digit = divmod(total, 10)
            digits.append(str(digit))
        return "".join([*digits, str(carry)])
    if skill == "lookup":
        pairs, key = prompt[:-1].split("?")
        return next(pair[1] for pair in pairs.split(",") if pair[0] == key)
    word = prompt[:-1]
    if skill == "carryless":
        a, b = word.split("+")
        return "".join(str(sum(map(int, pair)))[-1] for pair in zip(a, b, strict=True)) + "0"
    if skill == "shift":
        return "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in word)
    return {"reverse": word[::-1], "sort": "".join(sorted(word)), "copy": word}[skill]


@pytest.mark.parametrize("skill", sorted({*MIXTURE, *SKILLS}))
def test_answers_are_right_and_prompts_held_out(skill: str) -> None:
    seen, unseen = (examples(skill, 300, seed=1, held_out=held_out) for held_out in (False, True))
    assert all(each.answer == solve(skill, each.prompt) for each in (*seen, *unseen))
    assert {each.prompt for each in seen}.isdisjoint(each.prompt for each in unseen)
    assert all(zlib.crc32(each.prompt.encode()) % 8 == 0 for each in unseen)
    assert examples(skill, 300, seed=1, held_out=True) == unseen != examples(skill, 300, seed=2, held_out=True)
    assert set("".join(each.prompt + each.answer for each in seen)) <= set(CHARACTERS)


def test_an_unknown_skill() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        examples("divide", 1, seed=1, held_out=False)


def test_rows() -> None:
    chosen = examples("lookup", 5, seed=1, held_out=False)
    ids, wanted = rows_of(chosen)
    for row, flags, each in zip(ids, wanted, chosen, strict=True):
        length = len(each.prompt)
        assert row[:length].tolist() == encode(each.prompt)
        assert row[flags].tolist() == [*encode(each.answer), EOS]
        assert flags.nonzero()[0] == length
        assert bool((row[length + 2 :] == PAD).all())
    assert len(CHARACTERS) == len(set(CHARACTERS)) <= VOCABULARY - 3
    assert torch.tensor(encode(CHARACTERS)).max() < VOCABULARY
    assert encode("Z") == [2]


def test_requests_in_words() -> None:
    assert set(_COMMANDS) == set(_UNSEEN) == set(DESCRIPTIONS) == set(SKILLS)
    assert set(_FRAMES).isdisjoint(_UNSEEN_FRAMES)
    for skill in SKILLS:
        assert len(set(_COMMANDS[skill])) >= 10
        assert len(set(_UNSEEN[skill])) >= 3
        assert set(_COMMANDS[skill]).isdisjoint(_UNSEEN[skill])
    rows = asked(40, seed=1, unseen=True, held_out=True)
    assert [row.skill for row in rows] == list(SKILLS) * 10
    assert rows == asked(40, seed=1, unseen=True, held_out=True) != asked(40, seed=1, unseen=False, held_out=True)
    for row in rows:
        assert row.example.answer == solve(row.skill, row.example.prompt)
        assert set(row.text) <= set(CHARACTERS)
        if row.skill == "add":
            a, b = (str(int(number[::-1])) for number in row.example.prompt[:-1].split("+"))
            assert {a, b} <= {word.strip(",.?") for word in row.text.split()}
        else:
            assert row.example.prompt.rstrip(">") in row.text


def test_templates_share_their_words() -> None:
    """No single word decides: those of one skill occur for others."""
    words = {skill: {word for text in _COMMANDS[skill] for word in text.split()} for skill in SKILLS}
    assert {"letters", "order", "not", "alphabetical", "sort", "reverse", "backwards"} <= words["reverse"] & words[
        "sort"
    ]
    assert {"letter", "write", "backwards", "sort", "one"} <= words["reverse"] & words["shift"]
    assert {"alphabet", "letters", "write"} <= words["sort"] & words["shift"]
    assert {"count", "one", "backwards", "on"} <= words["add"] & words["shift"]
