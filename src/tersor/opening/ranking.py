"""Standings from verdicts: the four published win rates, their matrices, topics, and who can be compared with whom.

Pure Python. OpenING, arXiv 2411.18499, section 5.2; the intervals are in `fits` and `intervals`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tersor.opening.records import Verdict, lean

#: Below so many battles a cell of a topic table says little.
FEW = 10


@dataclass(frozen=True)
class Tally:
    """What one model did in its battles, or against one other model.

    Args:
        battles: All of them.
        wins: Decisive ones that it won.
        losses: Decisive ones that it lost.
        forced: Battles that are its own when ties are divided (FDT): wins, and ties that lean to it.
    """

    battles: int = 0
    wins: int = 0
    losses: int = 0
    forced: int = 0

    @property
    def ties(self) -> int:
        """Of any lean."""
        return self.battles - self.wins - self.losses

    def plus(self, verdict: Verdict, model: str) -> Tally:
        """With one battle more, seen by ``model``."""
        label = oriented(verdict, model).label
        return Tally(
            self.battles + 1,
            self.wins + (label == "A"),
            self.losses + (label == "B"),
            self.forced + (winner(verdict) == model),
        )


#: Published win rate -> numerator and denominator; a share without a denominator does not exist.
METRICS: dict[str, Callable[[Tally], tuple[float, int]]] = {
    "fdt": lambda tally: (tally.forced, tally.battles),
    "without_ties": lambda tally: (tally.wins, tally.wins + tally.losses),
    "ties_zero": lambda tally: (tally.wins, tally.battles),
    "ties_half": lambda tally: (tally.wins + tally.ties / 2, tally.battles),
}
#: Metric -> its name in the paper.
TITLES = {"fdt": "FDT", "without_ties": "w/o tie", "ties_zero": "w/ tie (0)", "ties_half": "w/ tie (.5)"}


def rate(tally: Tally, metric: str) -> float | None:
    """A win rate from 0 to 1; None where no battle counts for it."""
    numerator, denominator = METRICS[metric](tally)
    return numerator / denominator if denominator else None


def oriented(verdict: Verdict, a: str) -> Verdict:
    """The same verdict with ``a`` as A."""
    return verdict if verdict.a == a else verdict.flipped()


def winner(verdict: Verdict) -> str:
    """Who has the battle when ties are divided."""
    return verdict.a if lean(verdict) == "A" else verdict.b


def models_of(verdicts: Iterable[Verdict]) -> list[str]:
    """The contestants, by name."""
    return sorted({name for verdict in verdicts for name in (verdict.a, verdict.b)})


def tallies(verdicts: Iterable[Verdict]) -> dict[str, Tally]:
    """Model -> all its battles; the best by FDT first, equal ones by name."""
    found: dict[str, Tally] = {}
    for verdict in verdicts:
        for model in (verdict.a, verdict.b):
            found[model] = found.get(model, Tally()).plus(verdict, model)
    return dict(sorted(found.items(), key=lambda each: (-(rate(each[1], "fdt") or 0.0), each[0])))


def pairs(verdicts: Iterable[Verdict]) -> dict[tuple[str, str], Tally]:
    """(Model, other) -> its battles against that one; both directions."""
    found: dict[tuple[str, str], Tally] = {}
    for verdict in verdicts:
        for pair in ((verdict.a, verdict.b), (verdict.b, verdict.a)):
            found[pair] = found.get(pair, Tally()).plus(verdict, pair[0])
    return found


def matrix(
    verdicts: Iterable[Verdict], models: Sequence[str], metric: str, *, published: bool = False
) -> list[list[float | None]]:
    """Win rates of each model (row) against each other one (column); None where they did not meet.

    Args:
        verdicts: One for each battle.
        models: Rows and columns, in this order.
        metric: One of `METRICS`.
        published: The published matrix "w/o tie" divides by all battles of a pair, ties among them. Ours divides by
            the decisive ones, as the rate of the same name does.
    """
    found = pairs(verdicts)
    taken = "ties_zero" if published and metric == "without_ties" else metric
    return [[rate(found.get((row, column), Tally()), taken) for column in models] for row in models]


def by_topic(verdicts: Iterable[Verdict], *, task: bool = False) -> dict[str, list[Verdict]]:
    """Number of the topic (or "topic.task") -> its verdicts; by number, because names are spelled in several ways."""
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.task if task else verdict.task.partition(".")[0], []).append(verdict)
    return dict(sorted(found.items()))


def components(verdicts: Iterable[Verdict]) -> list[list[str]]:
    """Models that battles connect, the largest group first: between two groups nothing can be said."""
    neighbours: dict[str, set[str]] = {}
    for verdict in verdicts:
        neighbours.setdefault(verdict.a, set()).add(verdict.b)
        neighbours.setdefault(verdict.b, set()).add(verdict.a)
    found, left = [], set(neighbours)
    while left:
        found.append(sorted(_reached(min(left), neighbours)))
        left -= set(found[-1])
    return sorted(found, key=lambda group: (-len(group), group))


def unbounded(scores: Iterable[tuple[str, str, float]]) -> list[str]:
    """Models whose strength has no finite estimate.

    An estimate exists within a group whose members reach each other by wins (Zermelo 1929, Ford 1957). All models
    outside of the largest such group of their component are unbounded; a model that only wins or only loses is.

    Args:
        scores: Two models of a battle, and the score of the first from 0 to 1.
    """
    beats: dict[str, set[str]] = {}
    beaten: dict[str, set[str]] = {}
    for a, b, score in scores:
        for winner_, loser, points in ((a, b, score), (b, a, 1 - score)):
            beats.setdefault(winner_, set())
            beaten.setdefault(winner_, set())
            if points > 0:
                beats[winner_].add(loser)
                beaten.setdefault(loser, set()).add(winner_)
    groups, left = [], set(beats)
    while left:
        start = min(left)
        groups.append(_reached(start, beats) & _reached(start, beaten))
        left -= groups[-1]
    met = {model: beats[model] | beaten[model] for model in beats}
    bounded: set[str] = set()
    rest = set(beats)
    while rest:
        component = _reached(min(rest), met)
        rest -= component
        inside = sorted((group for group in groups if group <= component), key=len)
        if len(inside) == 1 or len(inside[-1]) > len(inside[-2]):
            bounded |= inside[-1]
    return sorted(set(beats) - bounded)


def _reached(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    found, todo = {start}, [start]
    while todo:
        new = edges[todo.pop()] - found
        found |= new
        todo += new
    return found
