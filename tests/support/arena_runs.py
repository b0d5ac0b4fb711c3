"""A run of the arena with instances, answers and battles, as small as a test wants it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tersor.opening.data import read_data
from tersor.opening.generators.base import generate_all
from tersor.opening.generators.scripted import LADDER, GoldGenerator
from tersor.opening.judging.runner import run_judge
from tersor.opening.judging.scripted import ScriptedJudge
from tersor.opening.mini import write_mini
from tersor.opening.outputs import Answer, fingerprint, model_folder, write_output
from tersor.opening.records import Battle
from tersor.opening.sampling import roaming
from tersor.opening.store import Store

#: Names that must not be seen.
CONTESTANTS = ("Zebra-7B", "Quagga XL")


def make_run(folder: Path, *, battles: int = 10, models: Sequence[str] = CONTESTANTS, seed: int = 0) -> None:
    """Write a run into ``folder``: the gold answers, each in another colour and with a text of its own.

    Args:
        folder: New or empty.
        battles: Of the first two models, each on an instance of its own.
        models: Names.
        seed: Of colours.
    """
    write_mini(folder / "data", each=1)
    instances = read_data(folder / "data").instances
    source = random.Random(seed)
    with Store.open(folder, create=True) as store:
        store.add_instances(instances, folder / "data")
        for model in models:
            place = model_folder(folder / "outputs", model)
            for instance in instances[:battles]:
                steps = []
                for step in instance.gold:
                    picture = Image.new("RGB", (48, 48), tuple(source.randrange(256) for _ in range(3)))
                    steps.append((step.text, picture))
                written = write_output(place, instance, Answer(tuple(steps)))
                store.add_output(model, instance.uid, written, fingerprint(place / f"{instance.uid}.json", written))
        store.add_battles(Battle.of(each.uid, each.task, models[0], models[1]) for each in instances[:battles])


def decided(folder: Path, judge: str = "scripted:faults,noise=1,bias=0.5", *, rounds: int = 2) -> str:
    """A run of the four generators of known order, small and decided; returns the judge's id."""
    with Store.open(folder, create=True) as store:
        write_mini(folder / "data", each=1)
        instances = read_data(folder / "data").instances[:12]
        store.add_instances(instances, folder / "data")
        for generator in (GoldGenerator(), *LADDER):
            generate_all(store, generator)
        store.add_battles(roaming(instances, store.models(), rounds))
        found = ScriptedJudge.from_text(judge.partition(":")[2])
        run_judge(store, found)
        return found.id
