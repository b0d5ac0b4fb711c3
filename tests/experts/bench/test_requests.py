"""Requests in words: who they are for, and templates that share their words."""

from __future__ import annotations

from skills import solve

from tersor.experts.bench.requests import _COMMANDS, _FRAMES, _UNSEEN, _UNSEEN_FRAMES, DESCRIPTIONS, draw_requests
from tersor.experts.bench.skills import CHARACTERS, SKILLS


def test_requests_in_words() -> None:
    assert set(_COMMANDS) == set(_UNSEEN) == set(DESCRIPTIONS) == set(SKILLS)
    assert set(_FRAMES).isdisjoint(_UNSEEN_FRAMES)
    for skill in SKILLS:
        assert len(set(_COMMANDS[skill])) >= 10
        assert len(set(_UNSEEN[skill])) >= 3
        assert set(_COMMANDS[skill]).isdisjoint(_UNSEEN[skill])
    rows = draw_requests(40, seed=1, unseen=True, held_out=True)
    assert [row.skill for row in rows] == list(SKILLS) * 10
    assert (
        rows
        == draw_requests(40, seed=1, unseen=True, held_out=True)
        != draw_requests(40, seed=1, unseen=False, held_out=True)
    )
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
