"""The words of the arena, and how verdicts are put together."""

from __future__ import annotations

import itertools

import pytest

from tersor.opening.records import (
    LABELS,
    VALUES,
    Battle,
    Raw,
    Verdict,
    battle_id,
    consensus,
    flip,
    from_both_orders,
    from_one_order,
    lean,
)

BATTLE = Battle.of("0101001", "01.01", "x", "y")


def both(straight, swapped, p=(None, None)):
    rows = [
        Raw(BATTLE.id, "j", order=order, label=label, probability=chance)
        for order, label, chance in zip((0, 1), (straight, swapped), p, strict=True)
    ]
    return from_both_orders(BATTLE, *rows)


def test_a_battle_has_one_id_whichever_model_comes_first() -> None:
    assert battle_id("u", "x", "y") == battle_id("u", "y", "x") != battle_id("v", "x", "y")
    assert battle_id("0101001", "Emu2", "GILL") == "29134b46fea099ba"  # the same on every machine


@pytest.mark.parametrize("pair", list(itertools.product(LABELS, LABELS)))
def test_two_orders_add_up_as_the_table_says(pair) -> None:
    total = VALUES[pair[0]] - VALUES[pair[1]]
    wanted = {4: "A", 3: "A", 2: "Tie(A)", 1: "Tie(A)", 0: "Tie", -1: "Tie(B)", -2: "Tie(B)", -3: "B", -4: "B"}
    found = both(*pair)
    assert found.label == wanted[total]
    assert found.first is None


def test_a_judge_that_always_takes_the_first_is_a_tie_and_not_consistent() -> None:
    found = both("A", "A")
    assert (found.label, found.consistent) == ("Tie", False)
    assert both("A", "B").consistent and both("Tie", "Tie").consistent
    assert both("A", "A", (0.9, 0.6)).label == "Tie(A)"
    assert both("A", "A", (0.6, 0.9)).label == "Tie(B)"
    assert both("A", "A", (0.9, 0.6)).probability == pytest.approx(0.65)


def test_a_verdict_of_the_swapped_order_is_about_a_and_b_again() -> None:
    found = from_one_order(BATTLE, Raw(BATTLE.id, "j", order=1, label="Tie(A)", probability=0.7))
    assert (found.label, found.first, found.consistent) == ("Tie(B)", "y", None)
    assert found.probability == pytest.approx(0.3)


def test_the_lean_of_a_bare_tie_does_not_depend_on_who_is_called_a() -> None:
    sides = set()
    for number in range(64):
        verdict = Verdict(
            battle_id(str(number), "x", "y"), str(number), "01.01", "x", "y", None, "Tie", None, None, "j"
        )
        winner = verdict.a if lean(verdict) == "A" else verdict.b
        turned = verdict.flipped()
        assert winner == (turned.a if lean(turned) == "A" else turned.b)
        sides.add(winner)
    assert sides == {"x", "y"}


@pytest.mark.parametrize("label", LABELS)
def test_flipping_twice_changes_nothing(label) -> None:
    assert flip(flip(label)) == label
    assert VALUES[flip(label)] == -VALUES[label]


def one(label, judge="j", a="x", b="y"):
    return Verdict(BATTLE.id, BATTLE.uid, BATTLE.task, a, b, a, label, None, None, judge)


@pytest.mark.parametrize(
    ("labels", "agreed"),
    [
        (("A", "A", "B"), "A"), (("A", "B"), "Tie"), (("A", "Tie(B)"), "Tie(A)"), (("Tie(A)", "Tie(B)", "B"), "Tie(B)"),
        (("Tie",), "Tie"), (("A", "A", "B", "B", "Tie(A)"), "Tie(A)"),
    ],
)  # fmt: skip
def test_a_consensus_is_the_majority_else_a_tie_that_leans(labels, agreed) -> None:
    (found,) = consensus([one(label) for label in labels], "panel")
    assert (found.label, found.judge) == (agreed, "panel")


def test_a_consensus_turns_verdicts_that_stand_the_other_way_round() -> None:
    (found,) = consensus([one("A"), one("B", a="y", b="x"), one("B")], "panel")
    assert (found.a, found.label, found.first) == ("x", "A", None)
