"""Pairs of answers that a judge is trained and tested on: from battles of an arena, and from references.

What the judge is tested on is kept away from its training twice: no instance is in both, by what it asks and not by
its name, and no model that is named unseen is in any pair of the training.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from tersor._errors import TersorError
from tersor.opening.prompts import WORDS
from tersor.opening.records import Battle, Instance, Label, Step, Verdict, flip
from tersor.opening.store import Store

Kind: TypeAlias = Literal["arena", "reference"]
#: Label -> the words that a judge says for it; a tie that leans to nobody has none.
SAID: dict[Label, str] = {label: words for words, label in WORDS.items()}


@dataclass(frozen=True)
class Source:
    """What pairs are made of.

    Args:
        kind: 'arena' where somebody was asked, 'reference' where one answer had the gold answer at hand.
        instances: What was asked.
        answers: Model -> instance -> steps.
        verdicts: One for each battle.
    """

    kind: Kind
    instances: Sequence[Instance]
    answers: Mapping[str, Mapping[str, tuple[Step, ...]]]
    verdicts: Sequence[Verdict]


@dataclass(frozen=True)
class Pair:
    """Two answers, and which is better.

    Args:
        kind: Of its source.
        instance: What was asked.
        verdict: About the model that is shown first, ``verdict.a``.
        first: The answer of ``verdict.a``.
        second: That of ``verdict.b``.
    """

    kind: Kind
    instance: Instance
    verdict: Verdict
    first: tuple[Step, ...]
    second: tuple[Step, ...]

    @property
    def label(self) -> Label:
        """Of the answer that is shown first."""
        return self.verdict.label

    @property
    def battle(self) -> Battle:
        """The battle with the first answer's model as its ``a``."""
        return Battle(self.verdict.battle, self.verdict.uid, self.verdict.task, self.verdict.a, self.verdict.b)

    def swapped(self) -> Pair:
        """The same pair with the other answer first."""
        return replace(self, verdict=self.verdict.flipped(), first=self.second, second=self.first)


@dataclass
class Parts:
    """Pairs to train and to validate on, and what was left out.

    Args:
        training: In one order each.
        validation: Battles that somebody decided, on other instances.
        dropped: Why -> how many.
    """

    training: list[Pair] = field(default_factory=list)
    validation: list[Pair] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def read_source(store: Store, judge: str, kind: Kind) -> Source:
    """The pairs of a run that a judge decided.

    Raises:
        TersorError: If it decided none.
    """
    verdicts = store.verdicts(judge)
    if not verdicts:
        raise TersorError(f"{judge} decided no battle of {store.folder}; its judges are {', '.join(store.judges())}")
    return Source(kind, store.instances(), {model: store.outputs(model) for model in store.models()}, verdicts)


def split(
    sources: Sequence[Source], *, unseen: Sequence[str] = (), held_out: float = 0.2, ratio: float = 4.0, seed: int = 0
) -> Parts:
    """Pairs to train on, and battles on other instances to validate with.

    Args:
        sources: Of both kinds.
        unseen: Models that must be in no pair of the training.
        held_out: Share of the arena's instances that are validated on.
        ratio: Pairs from references for one from the arena, at most; a random part of them is taken.
        seed: Of all that is drawn.

    Raises:
        TersorError: For an unseen model that is none, or if nothing is left to train or to validate on.
    """
    models = {name for source in sources for each in source.verdicts for name in (each.a, each.b)}
    if wrong := [name for name in unseen if name not in models]:
        raise TersorError(f"--unseen {wrong[0]!r} is in no battle; the models are {', '.join(sorted(models))}")
    parts, references = Parts(), list[Pair]()
    for source in sources:
        keys = {each.uid: content(each) for each in source.instances}
        for pair in pairs_of(source, parts.dropped):
            new = bool({pair.verdict.a, pair.verdict.b} & set(unseen))
            if _held_out(keys[pair.instance.uid], held_out, seed):
                if source.kind == "arena":
                    parts.validation.append(pair)
                else:
                    parts.dropped["reference pair on an instance of the validation"] += 1
            elif new:
                parts.dropped["unseen model on an instance of the training"] += 1
            else:
                (parts.training if source.kind == "arena" else references).append(pair)
    rng = random.Random(f"{seed}:pairs")
    most = round(ratio * len(parts.training))
    if len(references) > most:
        parts.dropped["reference pair above the ratio"] += len(references) - most
        references = rng.sample(references, most)
    parts.training = balanced([*parts.training, *references], rng)
    if not parts.training or not parts.validation:
        what = "train" if not parts.training else "validate"
        raise TersorError(f"nothing is left to {what} on; left out: {dict(parts.dropped) or 'nothing'}")
    check_apart(parts, unseen)
    return parts


def balanced(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """The pairs in random order, turned so that the better answer stands first as often as second, up to one."""
    order = rng.sample(list(pairs), len(pairs))
    return [
        pair if (pair.label in ("A", "Tie(A)")) == (place % 2 == 0) else pair.swapped()
        for place, pair in enumerate(order)
    ]


def check_apart(parts: Parts, unseen: Sequence[str]) -> None:
    """Raise `TersorError` where what is validated on leaked into the training, by instance or by model."""
    trained = {content(pair.instance) for pair in parts.training}
    for pair in parts.validation:
        if content(pair.instance) in trained:
            raise TersorError(f"instance {pair.instance.uid} is in training and validation")
    for pair in parts.training:
        if leaked := {pair.verdict.a, pair.verdict.b} & set(unseen):
            raise TersorError(f"model {min(leaked)} is unseen, and in a pair of the training")


def content(instance: Instance) -> str:
    """A fingerprint of what an instance asks, whatever it is called."""
    found = hashlib.sha256()
    for step in instance.inputs:
        found.update(step.text.encode() + b"\x1f")
        if step.image is not None:
            found.update(hashlib.sha256(step.image.read_bytes()).digest())
    return found.hexdigest()


def digest(pairs: Sequence[Pair]) -> str:
    """A fingerprint of pairs: instances, models, answers' texts and pictures, and labels."""
    found, pictures = hashlib.sha256(), dict[str, str]()
    for pair in pairs:
        told = [content(pair.instance), pair.verdict.a, pair.verdict.b, pair.label]
        for step in (*pair.first, *pair.second):
            name = str(step.image)
            if step.image is not None and name not in pictures:
                pictures[name] = hashlib.sha256(step.image.read_bytes()).hexdigest()
            told += [step.text, pictures.get(name, "")]
        found.update("\x1f".join(told).encode())
    return found.hexdigest()


def flipped_at_random(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The pairs with labels that say nothing: a coin decides each; what is learned from them is a control."""
    rng = random.Random(f"{seed}:coin")
    return [
        replace(pair, verdict=replace(pair.verdict, label=flip(pair.label))) if rng.random() < 0.5 else pair
        for pair in pairs
    ]


def pairs_of(source: Source, dropped: Counter[str]) -> list[Pair]:
    """The pairs of a source; what makes none is counted in ``dropped``, by why."""
    instances, found = {each.uid: each for each in source.instances}, []
    for verdict in source.verdicts:
        first, second = (source.answers.get(model, {}).get(verdict.uid) for model in (verdict.a, verdict.b))
        if first is None or second is None or verdict.uid not in instances:
            dropped["answer or instance missing"] += 1
        elif verdict.label == "Tie":
            dropped["tie that leans to nobody"] += 1
        elif _shown(first) == _shown(second):
            dropped["both answers the same"] += 1
        else:
            found.append(Pair(source.kind, instances[verdict.uid], verdict, first, second))
    return found


def _shown(steps: Sequence[Step]) -> list[tuple[str, bytes | None]]:
    return [(step.text, None if step.image is None else step.image.read_bytes()) for step in steps]


def _held_out(key: str, share: float, seed: int) -> bool:
    return int(hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()[:8], 16) < share * 2**32
