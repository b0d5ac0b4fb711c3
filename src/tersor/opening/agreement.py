"""How far two judges agree: the published agreement table, Cohen's kappa, confusion, and one judge asked twice.

OpenING, arXiv 2411.18499, section 5.3 and its table of judges.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tersor._errors import TersorError
from tersor.opening.intervals import Interval, share
from tersor.opening.ranking import by_topic, models_of, oriented, rate, tallies, winner
from tersor.opening.records import LABELS, Label, Verdict

#: Two verdicts on one battle, both with the same model as A: the judge's and the reference's.
Pair = tuple[Verdict, Verdict]
#: The published list of models that the judge was not trained on. Its first name is misspelt (the data say GPT-4o), so
#: that the published figures count that model as seen.
UNSEEN_OFFICIAL = ("GPT-4+DALL-E3", "Anole", "SEED-LLaMA", "NExT-GPT")
_DECISIVE = ("A", "B")


def _kind(verdict: Verdict) -> str:
    """A, B or Tie, whichever way the tie leans."""
    return verdict.label if verdict.label in _DECISIVE else "Tie"


#: Mode -> whether a pair agrees, None where it does not count.
MODES: dict[str, Callable[[Verdict, Verdict], bool | None]] = {
    "fdt": lambda judge, reference: winner(judge) == winner(reference),
    "with_ties": lambda judge, reference: _kind(judge) == _kind(reference),
    "without_ties": lambda judge, reference: (
        None if "Tie" in (_kind(judge), _kind(reference)) else judge.label == reference.label
    ),
}


@dataclass(frozen=True)
class Row:
    """Agreement in one mode, shares from 0 to 1; None where no battle counts.

    Args:
        average: Over all battles.
        seen: Over battles of two models that the judge was trained on.
        unseen: Over the others.
        n: Battles that count, of all, seen and unseen ones.
    """

    average: Interval | None
    seen: Interval | None
    unseen: Interval | None
    n: tuple[int, int, int]

    @property
    def harmonic(self) -> float | None:
        """Harmonic mean of seen and unseen."""
        if self.seen is None or self.unseen is None:
            return None
        total = self.seen.value + self.unseen.value
        return 2 * self.seen.value * self.unseen.value / total if total else 0.0


def matched(judge: Iterable[Verdict], reference: Iterable[Verdict]) -> list[Pair]:
    """The battles that both decided, in the reference's order and orientation."""
    found = {verdict.battle: verdict for verdict in judge}
    return [(oriented(found[each.battle], each.a), each) for each in reference if each.battle in found]


def agreement(pairs: Sequence[Pair], mode: str) -> Interval | None:
    """Share of battles on which both say the same, with its interval over instances.

    Args:
        pairs: From `matched`.
        mode: "fdt" divides ties by their lean, "with_ties" takes any tie for one, "without_ties" leaves out the battles
            that either calls a tie.
    """
    same = [MODES[mode](*pair) for pair in pairs]
    counts = [float(each is not None) for each in same]
    return share([float(bool(each)) for each in same], counts, [reference.uid for _, reference in pairs])


def agreement_table(pairs: Sequence[Pair], unseen: Sequence[str] = (), *, as_published: bool = False) -> dict[str, Row]:
    """Mode -> its row of the published table.

    Args:
        pairs: From `matched`.
        unseen: Models that the judge was not trained on; a battle is unseen if one of its models is.
        as_published: Take `UNSEEN_OFFICIAL` as it is, and its misspelt name for no model.

    Raises:
        TersorError: If a name in ``unseen`` is no model of the data.
    """
    known = models_of(reference for _, reference in pairs)
    if wrong := [name for name in unseen if name not in known]:
        raise TersorError(
            f"unseen model {wrong[0]!r} is in no battle; the models are {', '.join(known)}. The published list spells "
            "one of them wrong: --unseen-official takes it as it is"
        )
    new = set(UNSEEN_OFFICIAL if as_published else unseen)
    parts = (
        list(pairs),
        [pair for pair in pairs if not new & {pair[1].a, pair[1].b}] if new else [],
        [pair for pair in pairs if new & {pair[1].a, pair[1].b}],
    )
    table = {}
    for mode, same in MODES.items():
        average, seen, other = (agreement(part, mode) for part in parts)
        n, n_seen, n_unseen = (sum(same(*pair) is not None for pair in part) for part in parts)
        table[mode] = Row(average, seen, other, (n, n_seen, n_unseen))
    return table


def topic_table(pairs: Sequence[Pair]) -> dict[str, tuple[Interval | None, int]]:
    """Topic -> agreement by FDT and how many battles it has."""
    judged = {judge.battle: judge for judge, _ in pairs}
    found = {}
    for topic, references in by_topic(reference for _, reference in pairs).items():
        part = [(judged[each.battle], each) for each in references]
        found[topic] = (agreement(part, "fdt"), len(part))
    return found


def confusion(pairs: Sequence[Pair]) -> dict[Label, dict[Label, int]]:
    """Reference's label -> judge's label -> battles."""
    counts = Counter((reference.label, judge.label) for judge, reference in pairs)
    return {row: {column: counts[row, column] for column in LABELS} for row in LABELS}


def kappa(pairs: Sequence[Pair]) -> float | None:
    """Cohen's kappa of A, B and tie (Cohen 1960); None where chance alone explains everything, or nothing was asked.

    Every battle counts both ways round, because who is called A means nothing.
    """
    if not pairs:
        return None
    judged, referred = Counter[str](), Counter[str]()
    for pair in pairs:
        for counts, verdict in zip((judged, referred), pair, strict=True):
            counts[_kind(verdict)] += 1
            counts[_kind(verdict.flipped())] += 1
    chance = sum(judged[kind] * referred[kind] for kind in judged) / (4 * len(pairs) ** 2)
    same = sum(_kind(judge) == _kind(reference) for judge, reference in pairs) / len(pairs)
    return (same - chance) / (1 - chance) if chance < 1 else None


def kendall(first: Sequence[Verdict], second: Sequence[Verdict]) -> float | None:
    """Kendall's tau-b between the FDT rates of the models that both rank; None where one of them orders nothing."""
    one, two = tallies(first), tallies(second)
    both = sorted(one.keys() & two.keys())
    rates = [((rate(one[model], "fdt") or 0.0), (rate(two[model], "fdt") or 0.0)) for model in both]
    signs = [(_sign(a[0] - b[0]), _sign(a[1] - b[1])) for i, a in enumerate(rates) for b in rates[:i]]
    ordered = sum(a * a for a, _ in signs) * sum(b * b for _, b in signs)
    return sum(a * b for a, b in signs) / ordered**0.5 if ordered else None


def halves(verdicts: Iterable[Verdict]) -> tuple[list[Verdict], list[Verdict]]:
    """Two runs on different instances, made from one: what the ranking would have been with new pairs."""
    parts: tuple[list[Verdict], list[Verdict]] = ([], [])
    for verdict in verdicts:
        parts[hashlib.sha256(f"half:{verdict.uid}".encode()).digest()[0] & 1].append(verdict)
    return parts


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)
