"""Which pairs of models meet on which instance (arXiv 2411.18499, the roaming matches of its arena).

Each task draws by a generator of its own, so a new task or another order of files changes no battle of the others, and
two machines make the same list.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tersor._errors import TersorError
from tersor.opening.records import Battle, Instance


def roaming(instances: Sequence[Instance], models: Sequence[str], rounds: int = 2, seed: int = 0) -> list[Battle]:
    """Battles in rounds: first around a ring of the models, later between those that met least.

    In the first round the models of a task stand in a ring in random order, and each next instance takes the next
    neighbours. A later round takes for each instance a pair that is new to it: first of all without a model that is two
    battles ahead in the task, then the pair whose members were least used on the instance, then in the task, then that
    met least there; what is still equal is drawn.

    Args:
        instances: What is answered.
        models: Who answered; at least two.
        rounds: Battles on each instance.
        seed: Of everything drawn.

    Returns:
        Exactly `rounds` battles for each instance, those of the first round first.

    Raises:
        TersorError: If there are fewer than two models, or fewer pairs than rounds.
    """
    names = _names(models)
    most = len(names) * (len(names) - 1) // 2
    if not 1 <= rounds <= most:
        raise TersorError(f"rounds={rounds} must be from 1 to {most}: {len(names)} models make {most} pairs")
    found: list[list[Battle]] = [[] for _ in range(rounds)]
    for task, group in _by_task(instances).items():
        ring = list(names)
        rng = random.Random(f"{seed}:{task}")
        rng.shuffle(ring)
        used = _Uses(names)
        for place, instance in enumerate(group):
            a, b = ring[place % len(ring)], ring[(place + 1) % len(ring)]
            found[0].append(used.add(Battle.of(instance.uid, task, a, b)))
        for later in found[1:]:
            for instance in group:
                pair = min(
                    (each for each in itertools.combinations(names, 2) if not used.met(instance.uid, each)),
                    key=lambda each: (*used.of(instance.uid, each), rng.random()),
                )
                later.append(used.add(Battle.of(instance.uid, task, *used.oriented(pair, rng))))
    return [battle for each in found for battle in each]


def all_pairs(instances: Sequence[Instance], models: Sequence[str], seed: int = 0) -> list[Battle]:
    """Every pair of models on every instance; each model is shown first about half of the time."""
    return _every(instances, list(itertools.combinations(_names(models), 2)), seed)


def versus_baseline(instances: Sequence[Instance], models: Sequence[str], baseline: str, seed: int = 0) -> list[Battle]:
    """``baseline`` against every other model on every instance.

    Raises:
        TersorError: If the baseline is none of the models.
    """
    names = _names(models)
    if baseline not in names:
        raise TersorError(f"baseline={baseline!r} is none of the models: {', '.join(names)}")
    return _every(instances, [(baseline, each) for each in names if each != baseline], seed)


def add_model(
    new: str, existing: Sequence[Battle], instances: Sequence[Instance], models: Sequence[str], rounds: int = 1,
    seed: int = 0,
) -> list[Battle]:  # fmt: skip
    """Battles of a new model against models that are there, ``rounds`` on each instance; existing ones stay.

    Args:
        new: Name of the new model.
        existing: Battles that are there.
        instances: Those that the new model answered.
        models: The others.
        rounds: Opponents on each instance.
        seed: Of everything drawn.

    Raises:
        TersorError: If there are fewer opponents than rounds.
    """
    others = _names([each for each in models if each != new], least=1)
    if not 1 <= rounds <= len(others):
        raise TersorError(f"rounds={rounds} must be from 1 to {len(others)}: so many models are there to meet {new!r}")
    known = {each.id for each in existing}
    found = []
    for task, group in _by_task(instances).items():
        rng = random.Random(f"{seed}:{task}:{new}")
        used = _Uses([new, *others])
        for instance in group:
            for _ in range(rounds):
                pairs = [(new, each) for each in others if not used.met(instance.uid, (new, each))]
                pair = min(pairs, key=lambda each: (used.members[each[1]], rng.random()))
                found.append(used.add(Battle.of(instance.uid, task, *used.oriented(pair, rng))))
    return [each for each in found if each.id not in known]


def answered_by_both(
    instances: Iterable[Instance], answers: Mapping[str, Iterable[str]]
) -> tuple[list[Instance], dict[str, list[str]]]:
    """The instances that every model answered, and the uids that each model lacks.

    Args:
        instances: All of the run.
        answers: Model -> uids that it answered.
    """
    instances = list(instances)
    have = {model: set(uids) for model, uids in answers.items()}
    lacking = {model: [each.uid for each in instances if each.uid not in uids] for model, uids in have.items()}
    whole = [each for each in instances if all(each.uid in uids for uids in have.values())]
    return whole, {model: uids for model, uids in lacking.items() if uids}


class _Uses:
    """How often models and pairs were used on an instance, and in the task."""

    def __init__(self, names: Iterable[str]) -> None:
        self.on_instance: dict[str, Counter[str]] = {}
        self.pairs_on_instance: set[tuple[str, frozenset[str]]] = set()
        self.pairs: Counter[frozenset[str]] = Counter()
        self.members: Counter[str] = Counter(dict.fromkeys(names, 0))
        self.firsts: Counter[str] = Counter()

    def add(self, battle: Battle) -> Battle:
        self.on_instance.setdefault(battle.uid, Counter()).update(battle.pair)
        self.pairs_on_instance.add((battle.uid, battle.pair))
        self.pairs[battle.pair] += 1
        self.members.update(battle.pair)
        self.firsts[battle.a] += 1
        return battle

    def met(self, uid: str, pair: tuple[str, str]) -> bool:
        return (uid, frozenset(pair)) in self.pairs_on_instance

    def of(self, uid: str, pair: tuple[str, str]) -> tuple[bool, int, int, int]:
        here, (one, two) = self.on_instance.get(uid, Counter()), pair
        ahead = max(self.members[one], self.members[two]) - min(self.members.values()) >= 2
        return ahead, here[one] + here[two], self.members[one] + self.members[two], self.pairs[frozenset(pair)]

    def oriented(self, pair: tuple[str, str], rng: random.Random) -> tuple[str, str]:
        """The pair with the member first that was first less often; equal ones by a draw."""
        a, b = pair
        one, two = self.firsts[a], self.firsts[b]
        return (a, b) if one < two or (one == two and rng.random() < 0.5) else (b, a)


def _every(instances: Sequence[Instance], pairs: Sequence[tuple[str, str]], seed: int) -> list[Battle]:
    found = []
    for task, group in _by_task(instances).items():
        rng, used = random.Random(f"{seed}:{task}"), _Uses({name for pair in pairs for name in pair})
        for instance, pair in itertools.product(group, pairs):
            found.append(used.add(Battle.of(instance.uid, task, *used.oriented(pair, rng))))
    return found


def _by_task(instances: Sequence[Instance]) -> dict[str, list[Instance]]:
    """Task -> its instances by uid, whatever order they came in."""
    groups: dict[str, list[Instance]] = {}
    for each in sorted(instances, key=lambda each: each.uid):
        groups.setdefault(each.task, []).append(each)
    return dict(sorted(groups.items()))


def _names(models: Sequence[str], least: int = 2) -> list[str]:
    names = sorted(set(models))
    if len(names) != len(models):
        raise TersorError(f"models name {next(each for each, n in Counter(models).items() if n > 1)!r} twice")
    if len(names) < least:
        raise TersorError(f"battles need at least {least} models; there are {len(names)}")
    return names
