"""What the arena is about: instances, answers, battles and verdicts, and how verdicts are put together."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, get_args

#: ``Tie(A)`` is a tie in which A is slightly better; ``Tie`` leans to nobody.
Label: TypeAlias = Literal["A", "B", "Tie(A)", "Tie(B)", "Tie"]
LABELS: tuple[Label, ...] = get_args(Label)
#: How far a label is on A's side.
VALUES: dict[Label, int] = {"A": 2, "Tie(A)": 1, "Tie": 0, "Tie(B)": -1, "B": -2}
_BY_VALUE: dict[int, Label] = {value: label for label, value in VALUES.items()}
#: What became of one question to a judge: `ok` and `empty` (decided without asking) have a label, the others none.
Status: TypeAlias = Literal["ok", "empty", "unparsed", "refused", "too_large", "error"]


@dataclass(frozen=True)
class Step:
    """One instruction of an input, or one part of an answer.

    Args:
        text: May be empty.
        image: File of the picture, where there is one.
    """

    text: str
    image: Path | None = None


@dataclass(frozen=True)
class Instance:
    """A task to answer in text and pictures, with the answer that a person gave.

    Args:
        uid: Two digits of topic, two of task in it, three of the instance.
        meta_task_id: Of the topic, digits.
        subtask_id: Of the task within its topic, digits.
        data_id: Of the instance within its task, digits.
        meta_task_name: Of the topic; may be spelt in more than one way.
        subtask_name: Of the task; also the name of its folder of pictures.
        inputs: Instructions.
        gold: The answer of a person.
    """

    uid: str
    meta_task_id: str
    subtask_id: str
    data_id: str
    meta_task_name: str
    subtask_name: str
    inputs: tuple[Step, ...]
    gold: tuple[Step, ...]

    @property
    def task(self) -> str:
        """``MM.SS``: grouping goes by number, because names are misspelt."""
        return f"{self.meta_task_id.zfill(2)}.{self.subtask_id.zfill(2)}"


@dataclass(frozen=True)
class Battle:
    """Two answers to one instance; make it with `Battle.of`.

    Args:
        id: Hash of instance and names, the same on every machine and for both orientations.
        uid: Of the instance.
        task: ``MM.SS`` of the instance.
        a: Model that is shown first as sampled.
        b: The other one.
    """

    id: str
    uid: str
    task: str
    a: str
    b: str

    @classmethod
    def of(cls, uid: str, task: str, a: str, b: str) -> Battle:
        """The battle of ``a``, shown first, and ``b`` on the instance ``uid`` of ``task``."""
        return cls(battle_id(uid, a, b), uid, task, a, b)

    @property
    def pair(self) -> frozenset[str]:
        """Both names, in no order."""
        return frozenset((self.a, self.b))


def battle_id(uid: str, a: str, b: str) -> str:
    """Hash of an instance and two names in no order: 16 hexadecimal digits."""
    text = "\x1f".join((uid, *sorted((a, b))))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Raw:
    """One question to a judge, and what became of it: a row of the store.

    Args:
        battle: Id of the battle.
        judge: Id of the judge, such as ``endpoint:gpt-4o`` or ``human:anna``.
        prompt: Hash of the prompt that it was asked with.
        order: 0 where the battle's ``a`` was shown first, 1 where its ``b`` was.
        rep: Counts repetitions of the same question, from 0.
        status: What became of it.
        label: As shown: A is the answer that was shown first. None where there is no label.
        probability: That the answer shown first is better, from the judge's probabilities; None where unknown.
        text: What the judge said, word by word.
        latency: Seconds from the first attempt to the last reply.
        tokens_in: Of the prompt, as far as the judge says.
        tokens_out: Of the reply.
        attempts: Requests that were sent.
        time: Seconds since 1970, when it was recorded.
    """

    battle: str
    judge: str
    prompt: str = ""
    order: Literal[0, 1] = 0
    rep: int = 0
    status: Status = "ok"
    label: Label | None = None
    probability: float | None = None
    text: str = ""
    latency: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    attempts: int = 1
    time: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """One judge's final word on one battle, put together over the orders in which it saw it.

    Args:
        battle: Id of the battle.
        uid: Of the instance.
        task: ``MM.SS`` of the instance.
        a: A model.
        b: Another one.
        first: Which of the two was shown first; None where both orders were shown.
        label: About `a` and `b`, whoever was shown first.
        probability: That `a` is better; None where the judge gives none.
        consistent: Whether both orders say the same winner; None where one order was shown.
        judge: Id of the judge.
    """

    battle: str
    uid: str
    task: str
    a: str
    b: str
    first: str | None
    label: Label
    probability: float | None
    consistent: bool | None
    judge: str

    def flipped(self) -> Verdict:
        """The same verdict with the two models in the other order."""
        p = None if self.probability is None else 1 - self.probability
        return replace(self, a=self.b, b=self.a, label=flip(self.label), probability=p)


@dataclass(frozen=True)
class Score:
    """What a judge gave to one answer by itself.

    Args:
        uid: Of the instance.
        model: Who answered.
        scores: Criterion -> points and why; points are None where there are none.
    """

    uid: str
    model: str
    scores: dict[str, tuple[float | None, str]]


def flip(label: Label) -> Label:
    """The label after the two answers have changed places."""
    return _BY_VALUE[-VALUES[label]]


def lean(verdict: Verdict) -> Literal["A", "B"]:
    """Who wins where ties are divided by force; a tie that leans to nobody is split by a hash of the battle.

    The hash decides between the sorted names, so it does not depend on who is called A.
    """
    if value := VALUES[verdict.label]:
        return "A" if value > 0 else "B"
    first_name_wins = int(verdict.battle[:8], 16) % 2 == 0
    return "A" if first_name_wins == (verdict.a < verdict.b) else "B"


def from_one_order(battle: Battle, raw: Raw) -> Verdict:
    """The verdict of a judge that saw one order; `raw` must have a label."""
    assert raw.label is not None
    swapped = raw.order == 1
    p = raw.probability
    return Verdict(
        battle.id, battle.uid, battle.task, battle.a, battle.b,
        first=battle.b if swapped else battle.a,
        label=flip(raw.label) if swapped else raw.label,
        probability=p if p is None or not swapped else 1 - p,
        consistent=None, judge=raw.judge,
    )  # fmt: skip


def from_both_orders(battle: Battle, straight: Raw, swapped: Raw) -> Verdict:
    """One verdict of two, so that what a judge gives to the first place cancels.

    Both labels count -2 to 2 for the battle's ``a``. A sum of at least 3 is a win, one of 1 or 2 a tie that leans; a
    sum of 0 is a tie whose lean is the probabilities', where there are some.

    Args:
        battle: The battle.
        straight: With ``a`` shown first; must have a label.
        swapped: With ``b`` shown first; must have a label.
    """
    one, two = from_one_order(battle, straight), from_one_order(battle, swapped)
    values = VALUES[one.label], VALUES[two.label]
    total = sum(values)
    p = None if one.probability is None or two.probability is None else (one.probability + two.probability) / 2
    if abs(total) >= 3:
        label = _BY_VALUE[2 if total > 0 else -2]
    elif total:
        label = _BY_VALUE[1 if total > 0 else -1]
    else:
        label = "Tie" if p is None or p == 0.5 else "Tie(A)" if p > 0.5 else "Tie(B)"
    return replace(one, first=None, label=label, probability=p, consistent=_sign(values[0]) == _sign(values[1]))


def consensus(verdicts: Iterable[Verdict], judge: str) -> list[Verdict]:
    """One verdict a battle from those of several judges, in the order in which battles first come.

    The label that most gave, where one label has more voices than every other; else a tie that leans to the side that
    the labels' values add up to. The answer's place is forgotten, unless all saw the same one first.

    Args:
        verdicts: Of all judges; the two models of a battle may stand either way round.
        judge: What the consensus is called.
    """
    groups: dict[str, list[Verdict]] = {}
    for each in verdicts:
        first = groups.setdefault(each.battle, [])
        first.append(each if not first or each.a == first[0].a else each.flipped())
    return [_agreed(group, judge) for group in groups.values()]


def _agreed(group: Sequence[Verdict], judge: str) -> Verdict:
    counts = Counter(each.label for each in group).most_common()
    if len(counts) == 1 or counts[0][1] > counts[1][1]:
        label = counts[0][0]
    else:
        label = _BY_VALUE[_sign(sum(VALUES[each.label] for each in group))]
    known = [each.probability for each in group if each.probability is not None]
    p = sum(known) / len(known) if len(known) == len(group) else None
    places = {each.first for each in group}
    first = places.pop() if len(places) == 1 else None
    consistent = group[0].consistent if len(group) == 1 else None
    return replace(group[0], first=first, label=label, probability=p, consistent=consistent, judge=judge)


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
