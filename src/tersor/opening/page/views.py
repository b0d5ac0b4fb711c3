"""What a page shows of a battle: texts, and pictures by number. Nothing in it says whose answer is whose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tersor._images import PictureError
from tersor.opening.leases import Lease
from tersor.opening.pictures import fitted, read_rgb, save_jpeg
from tersor.opening.records import Instance, Label, Step
from tersor.opening.store import HUMAN, Store

#: Longest side of a picture in pixels.
SIDE = 1024
#: Key and button -> what it says of the answers as shown.
CHOICES: dict[str, tuple[Label, str]] = {
    "1": ("A", "A is better"),
    "2": ("Tie(A)", "Tie, A slightly"),
    "3": ("Tie(B)", "Tie, B slightly"),
    "4": ("B", "B is better"),
}


@dataclass(frozen=True)
class Shown:
    """A step as the page shows it.

    Args:
        text: Its text.
        picture: Number of its picture on the page; None where it has none.
    """

    text: str
    picture: int | None


@dataclass(frozen=True)
class View:
    """A battle as one person sees it.

    Args:
        question: Steps of the input.
        answers: Steps of the answer shown first, and of the other.
        pictures: Files by number; never sent.
    """

    question: list[Shown]
    answers: tuple[list[Shown], list[Shown]]
    pictures: list[Path]


class Gallery:
    """The battles of a run as pages show them.

    Args:
        store: The run.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.instances: dict[str, Instance] = {each.uid: each for each in store.instances()}
        self.outputs = {model: store.outputs(model) for model in store.models()}

    def view(self, lease: Lease) -> View:
        """What the person of a lease sees."""
        battle, pictures = lease.battle, list[Path]()

        def shown(steps: Sequence[Step]) -> list[Shown]:
            found = []
            for step in steps:
                there = step.image is not None and step.image.is_file()
                found.append(Shown(step.text, len(pictures) if there else None))
                pictures.extend([step.image] if there and step.image else [])
            return found

        question = shown(self.instances[battle.uid].inputs)
        first, second = (battle.a, battle.b) if lease.order == 0 else (battle.b, battle.a)
        answers = shown(self._answer(first, battle.uid)), shown(self._answer(second, battle.uid))
        return View(question, answers, pictures)

    def picture(self, lease: Lease, number: int) -> bytes | None:
        """A picture of the page as a JPEG of pixels alone: no comment, profile or date of the file goes with it."""
        pictures = self.view(lease).pictures
        if not 0 <= number < len(pictures):
            return None
        try:
            picture = fitted(read_rgb(pictures[number]), SIDE)
        except PictureError:
            return None  # the page says that there is one, and shows none
        picture.info.clear()
        return save_jpeg(picture)

    def _answer(self, model: str, uid: str) -> Sequence[Step]:
        return self.outputs.get(model, {}).get(uid, ())


def voted(store: Store, annotator: str) -> list[tuple[str, Label]]:
    """Token and vote as shown of each battle that a person voted on, in the order of the votes."""
    return [
        (token, label)
        for token, label in store.read(
            "SELECT token, label FROM verdict JOIN lease USING (battle_id) "
            f"WHERE annotator = ?1 AND judge_id = '{HUMAN}:' || ?1 AND rep = 0 ORDER BY ts, verdict.rowid",
            annotator,
        )
    ]


def progress(store: Store, annotator: str, votes: int, only: Sequence[str] | None = None) -> tuple[int, int, int]:
    """Votes of this person, battles that have as many votes as wanted, and all that people are asked about."""
    own = len(voted(store, annotator))
    done = store.read(
        "SELECT count(*) FROM (SELECT battle_id FROM verdict JOIN battle ON battle.id = battle_id "
        f"WHERE judge_id LIKE '{HUMAN}:%' AND rep = 0 "
        "AND (?1 IS NULL OR battle_id IN (SELECT value FROM json_each(?1))) GROUP BY battle_id HAVING count(*) >= ?2)",
        None if only is None else json.dumps(list(only)),
        votes,
    )
    return own, done[0][0], store.read("SELECT count(*) FROM battle")[0][0] if only is None else len(only)
