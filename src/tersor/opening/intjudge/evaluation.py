"""What a judge says of pairs that somebody decided: agreement, place, probability mass, and whether it looks.

Every pair is asked in both orders, by the same judge that is used later.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tersor import _atomic
from tersor.opening.agreement import Row, agreement, agreement_table, matched
from tersor.opening.intervals import Interval, share
from tersor.opening.intjudge.pairs import Pair
from tersor.opening.judging.base import Question, Reply
from tersor.opening.judging.local import LocalJudge
from tersor.opening.pictures import read_rgb, save_jpeg
from tersor.opening.prompts import WORDS
from tersor.opening.ranking import winner
from tersor.opening.records import Raw, Step, Verdict, from_both_orders

#: Of every picture of a judge that is not to see.
GREY = (128, 128, 128)
OnBattle: TypeAlias = Callable[[int, int], None]


@dataclass
class Decided:
    """A judge's words on pairs, in both orders.

    Args:
        pairs: What was asked about, as far as both orders were answered.
        raw: Both rows of each pair: with its first answer first, and second.
        judge: Its id.
    """

    pairs: list[Pair] = field(default_factory=list)
    raw: list[tuple[Raw, Raw]] = field(default_factory=list)
    judge: str = ""

    @property
    def verdicts(self) -> list[Verdict]:
        """One verdict a pair, as `tersor.opening.records.from_both_orders` makes it."""
        return [from_both_orders(pair.battle, *rows) for pair, rows in zip(self.pairs, self.raw, strict=True)]

    @property
    def references(self) -> list[Verdict]:
        """What the pairs' own labels say."""
        return [pair.verdict for pair in self.pairs]

    def agreement(self) -> Interval | None:
        """Share of pairs with the same winner, ties divided by their lean (FDT)."""
        return agreement(matched(self.verdicts, self.references), "fdt")

    def table(self, unseen: Sequence[str]) -> dict[str, Row]:
        """The published table of agreement; see `agreement_table`."""
        models = {name for pair in self.pairs for name in (pair.verdict.a, pair.verdict.b)}
        return agreement_table(matched(self.verdicts, self.references), [each for each in unseen if each in models])

    def first_share(self) -> Interval | None:
        """Share of questions in which the answer that was shown first won; one half is no liking for a place."""
        rows = [(raw, pair.instance.uid) for pair, both in zip(self.pairs, self.raw, strict=True) for raw in both]
        won = [float(raw.label in ("A", "Tie(A)")) for raw, _ in rows]
        return share(won, [1.0] * len(won), [uid for _, uid in rows])

    def consistent(self) -> Interval | None:
        """Share of pairs whose two orders have the same winner."""
        same = [float(bool(each.consistent)) for each in self.verdicts]
        return share(same, [1.0] * len(same), [pair.instance.uid for pair in self.pairs])

    def log_mass(self) -> float:
        """Median of the log-probability of all four verdicts together."""
        return float(statistics.median(json.loads(raw.text)["log_mass"] for both in self.raw for raw in both))

    def scores(self) -> tuple[npt.NDArray[np.float64], list[bool]]:
        """Log-probabilities ``[2 n, 4]`` of all questions, and whether the answer shown first is the better one."""
        found, wins = [], []
        for pair, both in zip(self.pairs, self.raw, strict=True):
            for raw in both:
                values = json.loads(raw.text)["log_probabilities"]
                found.append([values[words] for words in WORDS])
                wins.append((pair.label in ("A", "Tie(A)")) == (raw.order == 0))
        return np.array(found, dtype=np.float64), wins

    def chances(self) -> tuple[list[float], list[bool]]:
        """Each verdict's probability that the pair's first answer is better, and whether it is."""
        verdicts = [(verdict, pair) for verdict, pair in zip(self.verdicts, self.pairs, strict=True)]
        return [v.probability or 0.0 for v, _ in verdicts], [winner(p.verdict) == p.verdict.a for _, p in verdicts]


def decide(judge: LocalJudge, pairs: Sequence[Pair], on_battle: OnBattle = lambda done, of: None) -> Decided:
    """Ask a judge about each pair in both orders; pairs that are too large for it are left out."""
    replies: dict[tuple[str, int], Reply] = {}

    def record(question: Question, reply: Reply) -> Any:
        replies[question.battle.id, question.order] = reply
        on_battle(len(replies) // 2, len(pairs))

    judge.run(
        (
            Question(pair.battle, order, pair.instance, *shown)  # type: ignore[arg-type]
            for pair in pairs
            for order, shown in ((0, (pair.first, pair.second)), (1, (pair.second, pair.first)))
        ),
        record,
    )
    found = Decided(judge=judge.id)
    for pair in pairs:
        both = [replies[pair.battle.id, order] for order in (0, 1)]
        if all(each.label is not None for each in both):
            one, two = (
                Raw(pair.battle.id, judge.id, judge.prompt_hash, order, **vars(each))  # type: ignore[arg-type]
                for order, each in enumerate(both)
            )
            found.pairs.append(pair)
            found.raw.append((one, two))
    return found


def blanked(pairs: Sequence[Pair], folder: Path) -> list[Pair]:
    """The pairs with every picture of an answer replaced by a grey one of its size, kept in ``folder``."""

    def blank(steps: Sequence[Step]) -> tuple[Step, ...]:
        return tuple(replace(step, image=None if step.image is None else _grey(step.image, folder)) for step in steps)

    return [replace(pair, first=blank(pair.first), second=blank(pair.second)) for pair in pairs]


def _grey(file: Path, folder: Path) -> Path:
    picture = read_rgb(file)
    found = folder / f"grey-{picture.width}x{picture.height}.jpg"
    if not found.is_file():
        picture.paste(GREY, (0, 0, *picture.size))
        folder.mkdir(parents=True, exist_ok=True)
        _atomic.write_bytes(found, save_jpeg(picture))
    return found
