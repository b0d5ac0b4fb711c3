"""The mixed panel: coverage and length of its interval by simulation, and the cases that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tersor._errors import TersorError
from tersor.opening.powered import Powered, powered_mean, powered_score, powered_strata
from tersor.opening.records import Battle, Verdict

RUNS, PEOPLE, JUDGED = 500, 200, 3800


class Simulated:
    """Battles whose difference of quality is clear or close; people and a judge see it with errors of their own.

    People say who wins, or that it is a tie; the judge says how probable it is that the first answer is the better one.
    """

    def __init__(self, seed: int, *, judge: float = 0.65, bias: float = 0.0) -> None:
        self.rng, self.judge, self.bias = np.random.default_rng(seed), judge, bias
        seen, said = self._draw(400_000)
        self.edges = np.quantile(said, np.linspace(0, 1, 201)[1:-1])
        place = np.digitize(said, self.edges)
        self.chance = np.array([(seen[place == each] > 0).mean() for each in range(200)])
        self.truth = self._points(seen).mean()
        self.agreement = ((seen > 0) == (said > 0)).mean()

    def _draw(self, n: int):
        spread = np.where(self.rng.random(n) < 0.5, 0.5, 2.5)
        quality = self.rng.normal(0.2, 1, n) * spread
        return quality + self.rng.normal(0, 0.3, n), quality + self.rng.normal(0, self.judge, n)

    @staticmethod
    def _points(seen):
        return np.where(seen > 0.5, 1.0, np.where(seen < -0.5, 0.0, 0.5))

    def battles(self, n: int):
        """People's points and the judge's probabilities."""
        seen, said = self._draw(n)
        return self._points(seen), np.clip(self.chance[np.digitize(said, self.edges)] + self.bias, 0, 1)


@pytest.mark.parametrize("bias", [0.0, 0.2])
def test_the_interval_covers_and_is_shorter_than_that_of_people_alone(bias) -> None:
    world = Simulated(0, bias=bias)
    assert world.agreement == pytest.approx(0.80, abs=0.01)
    covered, lengths, judge_alone = 0, [], 0
    for _ in range(RUNS):
        votes, guesses = world.battles(PEOPLE + JUDGED)
        mean, error, _ = powered_mean(votes[:PEOPLE], guesses[:PEOPLE], guesses[PEOPLE:])
        covered += abs(mean - world.truth) <= 1.959964 * error
        lengths.append(error / (votes[:PEOPLE].std(ddof=1) / math.sqrt(PEOPLE)))
        alone = guesses.std(ddof=1) / math.sqrt(len(guesses))
        judge_alone += abs(guesses.mean() - world.truth) <= 1.959964 * alone
    assert 0.93 <= covered / RUNS <= 0.97
    assert np.mean(lengths) <= 0.7
    assert judge_alone / RUNS < 0.6  # what it repairs: the judge's own mean misses the truth


def test_a_judge_that_knows_nothing_costs_nothing() -> None:
    rng, ratios = np.random.default_rng(1), []
    for _ in range(200):
        votes = rng.integers(0, 2, PEOPLE).astype(float)
        guesses = rng.random(PEOPLE + JUDGED)
        _, error, weight = powered_mean(votes, guesses[:PEOPLE], guesses[PEOPLE:])
        assert weight < 0.5
        ratios.append(error / (votes.std(ddof=1) / math.sqrt(PEOPLE)))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.01)


def test_labels_alone_at_80_percent_save_a_fifth_at_most() -> None:
    """The bound: a correlation of 0.6 leaves sqrt(1 - 0.36) of the interval, whatever the number of judged battles."""
    rng = np.random.default_rng(2)
    votes = rng.integers(0, 2, 20_000).astype(float)
    guesses = np.where(rng.random(len(votes)) < 0.8, votes, 1 - votes)
    _, error, _ = powered_mean(votes[:1000], guesses[:1000], guesses[1000:])
    assert error / (votes[:1000].std(ddof=1) / math.sqrt(1000)) == pytest.approx(0.81, abs=0.03)


def test_a_perfect_judge_leaves_the_error_of_all_battles() -> None:
    rng = np.random.default_rng(3)
    votes = rng.integers(0, 2, 1000).astype(float)
    mean, error, weight = powered_mean(votes[:100], votes[:100], votes[100:])
    assert weight == pytest.approx(0.9, abs=0.01)
    assert mean == pytest.approx(votes.mean(), abs=0.01)
    assert error == pytest.approx(votes.std() / math.sqrt(1000), rel=0.05)


def _verdicts(points, probabilities=None, *, swap=lambda n: n % 2 == 1) -> list[Verdict]:
    """One verdict a battle about ``new`` and ``old``; every second one names ``old`` first."""
    found = []
    for number, value in enumerate(points):
        battle = Battle.of(f"{number:07}", "01.01", "new", "old")
        label = {1.0: "A", 0.5: "Tie(A)", 0.0: "B"}[value]
        p = None if probabilities is None else float(probabilities[number])
        verdict = Verdict(battle.id, battle.uid, battle.task, "new", "old", None, label, p, None, "judge")
        found.append(verdict.flipped() if swap(number) else verdict)
    return found


def test_the_score_is_of_the_candidate_whoever_is_named_first() -> None:
    world = Simulated(4)
    votes, guesses = world.battles(400)
    people, judge = _verdicts(votes)[:100], _verdicts(np.round(guesses), guesses)
    found = powered_score(people, judge, "new", "old")
    mean, error, weight = powered_mean(votes[:100], guesses[:100], guesses[100:])
    order = powered_score(people[::-1], judge[::-1], "new", "old")
    assert (found.people, found.judged) == (100, 300)
    assert found.score == pytest.approx(mean) and found.error == pytest.approx(error)
    assert found.weight == pytest.approx(weight)
    assert order.score == pytest.approx(found.score)
    other = powered_score(people, judge, "old", "new")
    assert other.score == pytest.approx(1 - found.score) and other.error == pytest.approx(found.error)
    assert found.alone == pytest.approx(votes[:100].mean())


def test_people_may_be_asked_more_often_where_the_judge_doubts() -> None:
    """Votes where the judge doubts are no random sample; as a stratum of their own they still give the truth."""
    world, covered, crude, runs = Simulated(5), 0, 0, 300
    for _ in range(runs):
        votes, guesses = world.battles(1000)
        doubt = np.maximum(guesses, 1 - guesses) < 0.7
        asked = np.where(doubt, world.rng.random(1000) < 0.5, world.rng.random(1000) < 0.1)
        found = powered_strata(
            [(votes[part & asked], guesses[part & asked], guesses[part & ~asked]) for part in (doubt, ~doubt)]
        )
        low, high = found.interval
        covered += low <= world.truth <= high
        crude += abs(votes[asked].mean() - world.truth) <= 1.96 * votes[asked].std() / math.sqrt(asked.sum())
    assert 0.9 <= covered / runs <= 0.98
    assert crude < covered


def test_strata_are_told_apart_by_the_battles_that_the_judge_doubts() -> None:
    votes, guesses = Simulated(7).battles(200)
    judge = _verdicts(np.round(guesses), guesses)
    ids = [each.battle for each in judge]
    found = powered_score(_verdicts(votes)[:100], judge, "new", "old", doubtful=frozenset([*ids[:60], *ids[150:]]))
    asked, rest = np.arange(200) < 100, np.arange(200) >= 100
    doubt = (np.arange(200) < 60) | (np.arange(200) >= 150)
    wanted = powered_strata(
        [(votes[part & asked], guesses[part & asked], guesses[part & rest]) for part in (~doubt, doubt)]
    )
    assert found.score == pytest.approx(wanted.score) and found.error == pytest.approx(wanted.error)
    with pytest.raises(TersorError, match="that the judge doubts"):
        powered_score(_verdicts(votes)[60:], judge, "new", "old", doubtful=frozenset(ids[:60]))


def test_too_few_votes_are_refused_and_all_votes_need_no_judge() -> None:
    votes, guesses = Simulated(6).battles(60)
    judge = _verdicts(np.round(guesses), guesses)
    with pytest.raises(TersorError, match="at least 10"):
        powered_score(_verdicts(votes)[:9], judge, "new", "old")
    with pytest.raises(TersorError, match="no battle"):
        powered_score(_verdicts(votes), judge, "new", "other")
    everything = powered_score(_verdicts(votes), judge, "new", "old")
    assert everything.score == pytest.approx(votes.mean()) and everything.shorter == 0.0
    assert (everything.people, everything.judged) == (60, 0)


def test_the_verdict_follows_the_one_sided_bounds() -> None:
    def at(score: float) -> str:
        return Powered(score, 0.02, score, 0.04, 1.0, 100, 900).verdict(0.05)

    assert (at(0.484), at(0.482), at(0.42), at(0.416)) == ("pass", "inconclusive", "inconclusive", "fail")
    assert Powered(0.5, 0.02, 0.5, 0.04, 1.0, 100, 900).worth == pytest.approx(400)
    assert Powered(0.5, 0.02, 0.5, 0.04, 1.0, 100, 900).shorter == pytest.approx(0.5)
