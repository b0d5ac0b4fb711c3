from __future__ import annotations

from dataclasses import replace

import pytest
from arena_verdicts import drawn, exchanged, leaning_otherwise, verdict

from tersor.opening.ranking import (
    METRICS,
    by_topic,
    components,
    matrix,
    models_of,
    pairs,
    rate,
    tallies,
    unbounded,
    winner,
)  # fmt: skip

#: Twelve battles with every label; x meets y six times, and each of them meets z three times.
HAND = [
    verdict("0101001", "x", "y", "A"), verdict("0101002", "y", "x", "A"), verdict("0101003", "x", "y", "Tie(A)"),
    verdict("0101004", "y", "x", "Tie(B)"), verdict("0101005", "x", "y", "Tie(B)"), verdict("0101006", "x", "y", "A"),
    verdict("0201001", "x", "z", "A", task="02.01"), verdict("0201002", "z", "x", "B", task="02.01"),
    verdict("0201003", "x", "z", "Tie(B)", task="02.01"), verdict("0202001", "y", "z", "B", task="02.02"),
    verdict("0202002", "z", "y", "Tie(A)", task="02.02"), verdict("0202003", "y", "z", "Tie(A)", task="02.02"),
]  # fmt: skip
#: x: 4 wins, 1 loss, 4 ties of 9, forced 4 + 2. y: 1 win, 3 losses, 5 ties of 9, forced 1 + 2. z: 1, 2, 3 of 6; 1 + 2.
RATES = {
    "x": {"fdt": 6 / 9, "without_ties": 4 / 5, "ties_zero": 4 / 9, "ties_half": 6 / 9},
    "y": {"fdt": 3 / 9, "without_ties": 1 / 4, "ties_zero": 1 / 9, "ties_half": 3.5 / 9},
    "z": {"fdt": 3 / 6, "without_ties": 1 / 3, "ties_zero": 1 / 6, "ties_half": 2.5 / 6},
}


def test_the_four_win_rates_are_those_worked_out_by_hand() -> None:
    found = tallies(HAND)
    assert list(found) == ["x", "z", "y"], "the best by FDT first"
    assert {m: {name: rate(t, name) for name in METRICS} for m, t in found.items()} == RATES


@pytest.mark.parametrize(
    ("metric", "published", "x_y", "x_z"),
    [
        ("fdt", False, 4 / 6, 2 / 3), ("without_ties", False, 2 / 3, 1.0), ("without_ties", True, 2 / 6, 2 / 3),
        ("ties_zero", False, 2 / 6, 2 / 3), ("ties_half", False, 3.5 / 6, 2.5 / 3),
        ("ties_half", True, 3.5 / 6, 2.5 / 3),
    ],
)  # fmt: skip
def test_both_conventions_of_the_matrix_are_those_worked_out_by_hand(
    metric: str, published: bool, x_y: float, x_z: float
) -> None:
    found = matrix(HAND, ["x", "y", "z"], metric, published=published)
    assert found[0] == [None, pytest.approx(x_y), pytest.approx(x_z)]
    assert [found[i][i] for i in range(3)] == [None] * 3


def test_who_is_called_a_changes_nothing() -> None:
    verdicts = drawn(1, 200, ties=0.8)
    assert tallies(exchanged(verdicts)) == tallies(verdicts)
    assert pairs(exchanged(verdicts)) == pairs(verdicts)


def test_each_battle_is_given_away_once() -> None:
    verdicts = [*drawn(2, 200, ties=0.8), verdict("9", "model 00", "model 01", "Tie")]
    assert sum(tally.forced for tally in tallies(verdicts).values()) == len(verdicts)
    for each in verdicts:
        assert sum((rate(t, "ties_half") or 0.0) for t in tallies([each]).values()) == 1


def test_turning_all_leans_changes_fdt_alone() -> None:
    turned = tallies(leaning_otherwise(HAND))
    assert {m: {name: rate(t, name) for name in METRICS if name != "fdt"} for m, t in turned.items()} == {
        m: {name: value for name, value in found.items() if name != "fdt"} for m, found in RATES.items()
    }
    assert {m: rate(t, "fdt") for m, t in turned.items()} != {m: found["fdt"] for m, found in RATES.items()}


def test_a_tie_without_lean_goes_to_the_same_model_whoever_is_a_and_to_each_of_two_about_as_often() -> None:
    ties = [verdict(f"{number:07d}", "x", "y", "Tie") for number in range(1000)]
    assert [winner(each) for each in exchanged(ties)] == [winner(each) for each in ties]
    assert 440 < sum(winner(each) == "x" for each in ties) < 560


def test_a_share_of_nothing_is_none() -> None:
    found = tallies([verdict("1", "x", "y", "Tie(A)")])
    assert rate(found["x"], "without_ties") is None
    assert rate(found["x"], "ties_zero") == 0
    assert tallies([]) == {} == by_topic([])
    assert matrix([], ["x", "y"], "fdt") == [[None, None], [None, None]]


def test_topics_go_by_number() -> None:
    assert {topic: len(found) for topic, found in by_topic(HAND).items()} == {"01": 6, "02": 6}
    assert {task: len(found) for task, found in by_topic(HAND, task=True).items()} == {
        "01.01": 6, "02.01": 3, "02.02": 3,
    }  # fmt: skip


def test_models_that_no_battle_connects_are_apart() -> None:
    island = [replace(HAND[0], a="p", b="q")]
    assert components([*HAND, *island]) == [["x", "y", "z"], ["p", "q"]]
    assert models_of(island) == ["p", "q"]


def test_a_model_without_a_finite_strength_is_found() -> None:
    ring = [("a", "b", 1.0), ("b", "c", 1.0), ("c", "a", 1.0)]
    assert unbounded(ring) == []
    assert unbounded([*ring, ("d", "a", 1.0), ("d", "b", 1.0)]) == ["d"], "it only wins"
    assert unbounded([*ring, ("a", "e", 1.0)]) == ["e"], "it only loses"
    # Neither only wins: but no chain of wins leads from the second ring to the first.
    assert unbounded([*ring, ("a", "x", 1.0), ("x", "y", 1.0), ("y", "x", 1.0)]) == ["x", "y"]
    assert unbounded([("a", "b", 1.0)]) == ["a", "b"], "neither is the one to hold on to"
    assert unbounded([("a", "b", 0.5)]) == []
