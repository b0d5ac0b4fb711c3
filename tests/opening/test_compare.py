from __future__ import annotations

import random
import statistics

import pytest
from arena_verdicts import exchanged, verdict

from tersor._errors import TersorError
from tersor.opening.compare import Comparison, compare_models
from tersor.opening.records import Verdict


def run(n: int, win: float, tie: float, seed: int = 0) -> list[Verdict]:
    """Battles of a candidate that wins and ties with these probabilities."""
    source = random.Random(seed)
    labels = source.choices(("A", "Tie", "B"), (win, tie, 1 - win - tie), k=n)
    return [verdict(str(i), "new", "old", label) for i, label in enumerate(labels)]  # type: ignore[arg-type]


def compared(verdicts: list[Verdict]) -> Comparison:
    return compare_models(verdicts, "old", "new")


@pytest.mark.parametrize(("win", "tie"), [(0.45, 0.0), (0.2, 0.5), (0.05, 0.8)])
def test_a_candidate_at_the_margin_passes_in_one_run_of_twenty(win: float, tie: float) -> None:
    said = [compared(run(200, win, tie, seed)).verdict for seed in range(300)]
    assert said.count("pass") / 300 < 0.09
    assert said.count("fail") / 300 < 0.09


def test_power_is_the_share_of_runs_that_pass_and_needed_battles_give_four_of_five() -> None:
    first = compared(run(100, 0.1, 0.8))
    share = statistics.fmean(compared(run(100, 0.1, 0.8, seed)).verdict == "pass" for seed in range(250))
    powers = [compared(run(100, 0.1, 0.8, seed)).power() for seed in range(50)]
    assert share == pytest.approx(statistics.fmean(powers), abs=0.06)  # type: ignore[type-var]
    needed = [compared(run(100, 0.1, 0.8, seed)).needed for seed in range(50)]
    enough = round(statistics.fmean(needed))  # type: ignore[type-var]
    again = statistics.fmean(compared(run(enough, 0.1, 0.8, seed)).verdict == "pass" for seed in range(250))
    assert again == pytest.approx(0.8, abs=0.07)
    assert first.power(4) > first.power(1)  # type: ignore[operator]


def test_a_clear_loss_fails_and_no_number_of_battles_would_mend_it() -> None:
    found = compared(run(100, 0.1, 0.1))
    assert found.verdict == "fail" and found.needed_as_seen is None and found.needed
    assert compared(run(400, 0.3, 0.5)).verdict == "pass"


def test_a_few_equal_verdicts_prove_nothing() -> None:
    for label in ("A", "Tie", "B"):
        few = [verdict(str(i), "new", "old", label) for i in range(3)]  # type: ignore[arg-type]
        assert compared(few).verdict == "inconclusive"
    many = [verdict(str(i), "new", "old", "Tie") for i in range(200)]
    assert compared(many).verdict == "pass"


def test_battles_on_one_instance_are_one_case() -> None:
    once = run(100, 0.45, 0.1)
    four = [verdict(each.uid, each.a, each.b, each.label) for each in once for _ in range(4)]
    one, copies = compared(once), compared(four)
    assert copies.score == one.score and (copies.tally.battles, copies.instances) == (400, 100)
    assert copies.low == pytest.approx(one.low, abs=0.01)
    assert one.needed and copies.needed and copies.needed > 3 * one.needed, "four on a prompt are worth one"


def test_who_is_called_a_changes_nothing_and_other_battles_do_not_count() -> None:
    verdicts = run(50, 0.4, 0.2)
    assert compared(exchanged(verdicts)) == compared(verdicts)
    assert compared([*verdicts, verdict("z", "new", "third", "B")]) == compared(verdicts)
    back = compare_models(verdicts, "new", "old")
    assert back.score == pytest.approx(1 - compared(verdicts).score)  # type: ignore[operator]


def test_no_battles_are_inconclusive_and_senseless_questions_are_refused() -> None:
    nothing = compared([])
    assert nothing.verdict == "inconclusive" and nothing.score is None and nothing.power() is None
    assert nothing.needed is None and nothing.needed_as_seen is None
    with pytest.raises(TersorError, match=r"margin=0\.5"):
        compare_models([], "a", "b", margin=0.5)
    with pytest.raises(TersorError, match="both 'a'"):
        compare_models([], "a", "a")
