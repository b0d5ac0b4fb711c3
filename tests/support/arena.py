"""Runs of the arena with answers and battles, without a model."""

from __future__ import annotations

from pathlib import Path

from tersor.opening.data import read_data
from tersor.opening.outputs import ANSWERS, Answer, fingerprint, model_folder, write_output
from tersor.opening.pictures import read_rgb
from tersor.opening.sampling import roaming
from tersor.opening.store import Store


def answer(store: Store, model: str, instance, steps: list) -> None:
    """Have a model answer an instance with texts and pictures."""
    folder = model_folder(store.folder / ANSWERS, model)
    written = write_output(folder, instance, Answer(tuple(steps)))
    store.add_output(model, instance.uid, written, fingerprint(folder / f"{instance.uid}.json", written))


def fill(store: Store, root: Path, models: list[str], *, rounds: int = 1, count: int = 46) -> None:
    """Models that give the gold answer with their name in front; the first one without any fault."""
    instances = read_data(root).instances[:count]
    store.add_instances(instances, root)
    for number, model in enumerate(models):
        for instance in instances:
            gold = [(f"{step.text} ({model})", read_rgb(step.image)) for step in instance.gold]
            answer(store, model, instance, gold[: max(1, len(gold) - number)])
    store.add_battles(roaming(instances, models, rounds))
