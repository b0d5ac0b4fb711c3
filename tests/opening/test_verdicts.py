"""The parser, on replies as judges give them; what it cannot read for certain it does not read."""

from __future__ import annotations

import random

import pytest

from tersor.opening.verdicts import parse, thought_only

REPLIES = {
    # As asked for
    "A is better": "A", "B is better": "B", "Tie(A is better)": "Tie(A)", "Tie(B is better)": "Tie(B)",
    "A is better.": "A", " B is better\n": "B", '"A is better"': "A", "'Tie(B is better)'": "Tie(B)",
    # Spellings that a parser of first letters gets wrong
    "Answer: B is better": "B", "Model A is better": "A", "**A** is better": "A", "Tie (A is better)": "Tie(A)",
    "tie(b)": "Tie(B)", "tie (a is better)": "Tie(A)", "Tie(B)": "Tie(B)", "TIE(A)": "Tie(A)", "Tie: B": "Tie(B)",
    "Tie, leaning towards B": "Tie(B)", "Tie, but A is slightly better": "Tie(A)", "Tie(Model B is better)": "Tie(B)",
    "tie - slight preference for A": "Tie(A)", "a is better": "A", "b": "B", "Both are fine. B is better": "B",
    "**Verdict:** B": "B", "### Verdict\nB is better": "B", "`B is better`": "B", "__A__ is better": "A",
    "Output_B is better": "B", "Answer B wins.": "B", "Option A is clearly the better answer.": "A",
    "The winner is B": "B", "Winner: A": "A", "I prefer answer B.": "B", "B is the preferred answer": "B",
    # Single letters and brackets
    "A": "A", "B.": "B", "(B)": "B", "[[A]]": "A", "[[B]]": "B", "[[A>B]]": "A", "[[A>>B]]": "A", "[[B>A]]": "B",
    "[[A<B]]": "B", "[[C]]": "Tie", "[[A=B]]": "Tie", "[[tie]]": "Tie", "My final verdict is: [[B>>A]]": "B",
    "A > B": "A", "A ≻ B": "A", "A < B": "B", r"\boxed{B}": "B", r"$\boxed{\text{A}}$": "A",
    # Ties that lean to nobody
    "tie": "Tie", "Tie.": "Tie", "It's a tie.": "Tie", "Tie between A and B": "Tie", "Tie ()": "Tie",
    "A and B are equally good.": "Tie", "a draw": "Tie",
    # JSON
    '{"verdict": "B is better"}': "B", '```json\n{"verdict": "Tie(A)"}\n```': "Tie(A)", '{"winner": "A"}': "A",
    '{"reason": "B is better in colour", "verdict": "A"}': "A", 'Sure: {"verdict": "B"} as asked.': "B",
    # Thoughts before the answer
    "<think>A is better? No.</think>B is better": "B", "A is better, hm.</think>\n\nB is better": "B",
    "<thinking>B</thinking> Tie(A is better)": "Tie(A)", "◁think▷B is better◁/think▷A is better": "A",
    # Several verdicts, the last one marked as the final one
    "A is better in style, but B is better overall.": "B",
    "A is better at colours. B is better at steps. Final verdict: B is better": "B",
    "B is better than A. Verdict: B is better": "B", "A is better than B": "A", "B is worse than A.": "A",
    "A is worse": "B", "It is not a tie; A is better.": "A", "A does not show the pictures. B is better.": "B",
    'Output B says "A is better", which I ignore. Final verdict: B is better': "B",
    # What is no verdict
    "": None, "Both": None, "Both are good": None, "A is not better": None, "B is not correct.": None,
    "I don't think A is better": None, "I do not think that B is better.": None, "Neither A nor B is better": None,
    "Whether A is better is hard to say": None, "A is better, or B is better": None, "A or B": None,
    "Answer: A or B": None,
    "A is better. B is better.": None, "Based on the criteria, I": None, "I cannot judge these pictures.": None,
    "Choose one of: A is better, B is better, Tie(A is better), Tie(B is better)": None,
    "A better answer has pictures.": None,
    "Answer A shows a red circle.": None, "<think>A is better": None, "<think>A is better</think>": None, "C": None,
    'Output A contains the words "A is better".': None, "The answer asks me to say A is better.": None,
    '{"verdict": null}': None, '{"score": 7}': None, "Answer: A is not better": None, "A is": None, "A and B": None,
    "The best part of A is its colour; the best part of B is its text.": None,
}  # fmt: skip


def test_the_table_is_long_enough() -> None:
    assert len(REPLIES) >= 100


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_is_read_as_it_is_meant(reply: str) -> None:
    assert parse(reply) == REPLIES[reply]


def test_nothing_is_drawn_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("random", "choice", "randint", "shuffle"):
        monkeypatch.setattr(random, name, lambda *values: pytest.fail("drawn"))
    assert [parse(reply) for reply in REPLIES] == [parse(reply) for reply in REPLIES] == list(REPLIES.values())


def test_verdicts_of_a_and_b_mirror_each_other() -> None:
    swap = str.maketrans("AB", "BA")
    mirrored = {"A": "B", "B": "A", "Tie(A)": "Tie(B)", "Tie(B)": "Tie(A)", "Tie": "Tie", None: None}
    for reply, label in REPLIES.items():
        if reply.lower() not in ("a is better", "b", "tie(b)", "tie (a is better)") and "a draw" not in reply:
            turned = reply.translate(swap)
            assert parse(turned) == mirrored[label], turned


def test_thoughts_without_an_answer_are_known() -> None:
    assert thought_only("<think>I wonder") and thought_only("<think>A is better</think>  ")
    assert not thought_only("") and not thought_only("A is better")


def test_a_long_reply_is_read_fast() -> None:
    for reply in (
        "tie " * 20_000,
        "A is " * 20_000,
        "{" * 5_000,
        "<think>" * 5_000,
        " " * 50_000,
        "the better " * 9_000,
    ):
        parse(reply)
