"""Requests in words: who they are for, and templates that share their words."""

from __future__ import annotations

from skills import solve

from tersor.experts.bench.requests import DESCRIPTIONS, TEMPLATES, draw_requests
from tersor.experts.bench.skills import CHARACTERS, SKILLS

COMMANDS, UNSEEN = TEMPLATES["commands"], TEMPLATES["unseen_commands"]


def test_requests_in_words() -> None:
    assert set(COMMANDS) == set(UNSEEN) == set(DESCRIPTIONS) == set(SKILLS)
    assert set(TEMPLATES["frames"]).isdisjoint(TEMPLATES["unseen_frames"])
    for skill in SKILLS:
        assert len(set(COMMANDS[skill])) >= 10
        assert len(set(UNSEEN[skill])) >= 3
        assert set(COMMANDS[skill]).isdisjoint(UNSEEN[skill])
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
    words = {skill: {word for text in COMMANDS[skill] for word in text.split()} for skill in SKILLS}
    assert {"letters", "order", "not", "alphabetical", "sort", "reverse", "backwards"} <= words["reverse"] & words[
        "sort"
    ]
    assert {"letter", "write", "backwards", "sort", "one"} <= words["reverse"] & words["shift"]
    assert {"alphabet", "letters", "write"} <= words["sort"] & words["shift"]
    assert {"count", "one", "backwards", "on"} <= words["add"] & words["shift"]
