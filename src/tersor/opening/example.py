"""The whole loop on opening-mini: four generators whose order is known, and a judge that is a program."""

from __future__ import annotations

from collections.abc import Callable

from tersor.opening.data import read_data
from tersor.opening.generators.base import InterleavedGenerator, generate_all
from tersor.opening.generators.scripted import LADDER, GoldGenerator
from tersor.opening.judging.runner import run_judge
from tersor.opening.judging.scripted import ScriptedJudge
from tersor.opening.mini import write_mini
from tersor.opening.sampling import roaming
from tersor.opening.store import Store

#: Decides by the faults of an answer, with noise and a liking for what it sees first.
JUDGE = "faults,noise=0.5,bias=0.5"
#: Who answers, the best first.
ORDER = (GoldGenerator().name, *(each.name for each in LADDER))
#: Battles on each instance: all pairs.
ROUNDS = 6
DATA = "data"


def fill(
    store: Store, *, seed: int, rounds: int = ROUNDS, on_progress: Callable[[str], None] = lambda text: None
) -> None:
    """Write instances, answers and battles into a new run; what is there stays as it is."""
    on_progress("instances")
    write_mini(store.folder / DATA, seed=seed)
    store.add_instances(read_data(store.folder / DATA).instances, store.folder / DATA)
    generators: tuple[InterleavedGenerator, ...] = (GoldGenerator(), *LADDER)
    for generator in generators:
        on_progress(f"answers of {generator.name}")
        generate_all(store, generator, seed=seed)
    store.add_battles(roaming(store.instances(), ORDER, rounds, seed))


def decide(store: Store, *, seed: int, on_progress: Callable[[str], None] = lambda text: None) -> str:
    """Have the scripted judge decide every battle in both orders; returns its id."""
    judge = ScriptedJudge.from_text(f"{JUDGE},seed={seed}")
    run_judge(store, judge, on_progress=lambda done, of: on_progress(f"{judge.id}: {done} of {of} verdicts"))
    return judge.id
