"""Verifiers, by tables of answers that models write."""

from __future__ import annotations

import pytest

from tersor.rl.verifiers import exact_match, find_verifier, multiple_choice, number

CHOICES = [
    ("B", "B", 1), ("b", "B", 1), ("(B)", "B", 1), ("B.", "B", 1), ("B) a cat", "B", 1), ("**B**", "B", 1),
    ("The answer is B.", "B", 1), ("Answer: (B)", "B", 1), ("I think A, but the answer is B", "B", 1),
    ("The answer is A. No: the answer is B.", "B", 1), ("It must be (B), a cat", "B", 1), ("B", "(B)", 1),
    ("A", "B", 0), ("", "B", 0), ("a cat", "B", 0), ("I'd say (A) or (B)", "B", 0), ("Because", "B", 0),
    ("B", ["A", "B"], 1), ("answer", "A", 0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer", "score"), CHOICES)
def test_the_letter_that_was_chosen_is_found(text: str, answer, score: int) -> None:
    assert multiple_choice(text, answer) == score


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("red", "red", 1), (" Red. ", "red", 1), ("dark  red", "Dark red", 1), ("red", "blue", 0), ("a red", "red", 0),
        ("red", ["blue", "red"], 1), ("", "red", 0), ("3", 3, 1),
    ],
)  # fmt: skip
def test_texts_match_but_for_case_spaces_and_points(text: str, answer, score: int) -> None:
    assert exact_match(text, answer) == score


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("42", "42", 1), ("It is 41, no, 42.", "42", 1), ("42.0", 42, 1), ("1,234", "1234", 1), ("-3", "-3", 1),
        ("4.2e1", "42", 1), ("42 or 43", "42", 0), ("none", "42", 0), ("42", "many", None), ("0", "0", 1),
        ("3", "-3", 0), ("43", ["42", "43"], 1),
    ],
)  # fmt: skip
def test_the_last_number_counts(text: str, answer, score) -> None:
    assert number(text, answer) == score


def test_a_tolerance_is_a_share_of_the_number() -> None:
    near = find_verifier("number:0.05")
    assert near("104", "100") == 1 and near("106", "100") == 0


def test_verifiers_are_found_by_name_and_in_modules() -> None:
    assert find_verifier("choice") is multiple_choice
    assert find_verifier("tersor.rl.verifiers:exact_match") is exact_match
    for name in ("", "nothing", "number:x", "number:1", "os:nothing", "no.such.module:f", "os:path", ":f"):
        with pytest.raises(ValueError, match="verifier="):
            find_verifier(name)
