"""Which battles people are asked about: those that a judge doubts, and a random sample of the others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tersor._errors import TersorError
from tersor.opening.records import Verdict
from tersor.opening.store import Store

_KEY = "asked"


@dataclass(frozen=True)
class Asked:
    """The battles that a run keeps for people.

    Args:
        judge: Who doubts, with its prompt's hash; empty where nobody was asked to.
        below: Probability of its winner below which it doubts.
        doubtful: Battles that it doubts.
        sample: Others, drawn at random.
    """

    judge: str = ""
    below: float = 0.0
    doubtful: tuple[str, ...] = ()
    sample: tuple[str, ...] = ()

    def order(self, seed: int = 0) -> list[str]:
        """All of them in a random order, so that however far people come, they have seen a random part of each."""
        found = [*self.doubtful, *self.sample]
        random.Random(f"{seed}:order").shuffle(found)
        return found


def read_asked(store: Store) -> Asked | None:
    """What the run keeps for people; None where that is everything."""
    if (kept := store.get(_KEY)) is None:
        return None
    return Asked(kept["judge"], kept["below"], tuple(kept["doubtful"]), tuple(kept["sample"]))


def doubtful(verdicts: Sequence[Verdict], below: float) -> tuple[str, ...]:
    """Battles whose winner has a probability below ``below``.

    Raises:
        TersorError: If a verdict has no probability.
    """
    found = []
    for verdict in verdicts:
        if verdict.probability is None:
            raise TersorError(
                f"judge {verdict.judge} gives no probability, so nothing says when it doubts; ask a checkpoint, or an "
                "endpoint with --logprobs"
            )
        if max(verdict.probability, 1 - verdict.probability) < below:
            found.append(verdict.battle)
    return tuple(found)


def set_doubtful(store: Store, judge: str, prompt: str, below: float) -> Asked | None:
    """Keep what a judge doubts for people, beside a sample that is there; ``below=0`` forgets it.

    Args:
        store: The run.
        judge: Who decided.
        prompt: Hash of what it was asked with.
        below: See `Asked`.
    """
    before = read_asked(store) or Asked()
    found = doubtful(store.verdicts(judge, prompt=prompt), below) if below else ()
    sample = tuple(each for each in before.sample if each not in set(found))
    return _keep(store, Asked(f"{judge} {prompt}".strip() if below else "", below, found, sample))


def set_sample(store: Store, n: int, seed: int) -> Asked | None:
    """Keep ``n`` battles, drawn from those that no judge doubts, for people; 0 forgets them.

    Raises:
        TersorError: If there are fewer.
    """
    before = read_asked(store) or Asked()
    others = sorted({each.id for each in store.battles()} - set(before.doubtful))
    if n > len(others):
        raise TersorError(f"--sample {n} is more than the {len(others)} battles that no judge doubts")
    drawn = tuple(random.Random(f"{seed}:sample").sample(others, n))
    return _keep(store, Asked(before.judge, before.below, before.doubtful, drawn))


def _keep(store: Store, asked: Asked) -> Asked | None:
    kept = asked if asked.judge or asked.sample else None
    store.set(_KEY, None if kept is None else asdict(kept))
    return kept
