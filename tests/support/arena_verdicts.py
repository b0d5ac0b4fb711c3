"""Verdicts made by hand or drawn from known strengths."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from tersor.opening.records import Instance, Label, Verdict, battle_id
from tersor.opening.sampling import roaming

#: Strengths of the eleven models of the recovery tests, around a mean of 0.
STRENGTHS = (1.58, 1.32, 0.72, 0.10, 0.05, -0.20, -0.41, -0.60, -0.71, -0.76, -1.09)
NAMES = [f"model {index:02d}" for index in range(len(STRENGTHS))]


def verdict(
    uid: str, a: str, b: str, label: Label, *, first: str | None = None, judge: str = "j", task: str = "01.01"
) -> Verdict:
    return Verdict(battle_id(uid, a, b), uid, task, a, b, first, label, None, None, judge)


def exchanged(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """A and B in each other's place."""
    return [each.flipped() for each in verdicts]


def leaning_otherwise(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Ties with their leans turned round."""
    turned: dict[Label, Label] = {"Tie(A)": "Tie(B)", "Tie(B)": "Tie(A)"}
    return [replace(each, label=turned.get(each.label, each.label)) for each in verdicts]


def drawn(
    seed: int, instances: int = 2160, *, rounds: int = 2, first: float = 0.0, ties: float = 0.0,
    strengths: Sequence[float] = STRENGTHS, weakest_first: bool = False,
) -> list[Verdict]:  # fmt: skip
    """Battles of random pairs, ``rounds`` an instance, with outcomes by Davidson's model.

    Args:
        seed: Of everything.
        instances: How many.
        rounds: Battles of each.
        first: Log odds of being shown first.
        ties: Davidson's nu; half of the ties lean to each side.
        strengths: Of the models.
        weakest_first: The last model is always shown first.
    """
    source, found = random.Random(seed), []
    for number in range(instances):
        pairs: list[tuple[int, int]] = []
        while len(pairs) < rounds:
            a, b = source.sample(range(len(strengths)), 2)
            if weakest_first and b == len(strengths) - 1:
                a, b = b, a
            if (a, b) not in pairs and (b, a) not in pairs:
                pairs.append((a, b))
        for a, b in pairs:
            label = outcome(source, strengths[a] - strengths[b] + first, ties)
            found.append(verdict(f"{number:07d}", NAMES[a], NAMES[b], label, first=NAMES[a]))
    return found


def outcome(source: random.Random, lead: float, ties: float = 0.0) -> Label:
    """A label by Davidson's model: log odds of the one shown first, and nu."""
    odds = math.exp(lead / 2), math.exp(-lead / 2), ties / 2, ties / 2
    label: Label = source.choices(("A", "B", "Tie(A)", "Tie(B)"), odds)[0]  # type: ignore[assignment]
    return label


def roamed(seed: int, tasks: Sequence[int]) -> list[Verdict]:
    """Two battles an instance as the arena samples them, the eleven models in roaming matches.

    Args:
        seed: Of everything.
        tasks: Instances of each task.
    """
    asked = [
        Instance(f"{task:02}01{n:03}", f"{task:02}", "01", f"{n:03}", "", "", (), ())
        for task, size in enumerate(tasks, 1)
        for n in range(1, size + 1)
    ]
    source, found = random.Random(seed), []
    for each in roaming(asked, NAMES, 2, seed):
        lead = STRENGTHS[NAMES.index(each.a)] - STRENGTHS[NAMES.index(each.b)]
        found.append(verdict(each.uid, each.a, each.b, outcome(source, lead), first=each.a, task=each.task))
    return found
