"""Sets of pairs that exist: instances, answers of models, which two met, and who won."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tersor._errors import TersorError
from tersor.opening.data import Problem, read_data
from tersor.opening.official import Row, read_rows
from tersor.opening.outputs import ANSWERS, Answer, fingerprint, folders, model_folder, read_outputs, write_output
from tersor.opening.pictures import confined, fault
from tersor.opening.records import Battle, Instance, Raw, Step
from tersor.opening.store import Store

#: Where the four tasks of MMRB2 stand among topics.
_MMRB2_TASKS = ("t2i", "edit", "interleaved", "reasoning")


@dataclass
class Pairs:
    """What a source holds.

    Args:
        root: Folder that the pictures of the instances lie in.
        instances: What was asked.
        answers: Model -> uid -> steps.
        rows: Who met on which instance, and who won where that is known.
        problems: What was wrong.
    """

    root: Path
    instances: list[Instance] = field(default_factory=list)
    answers: dict[str, dict[str, tuple[Step, ...]]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class PairSource(Protocol):
    """A kind of files that pairs are read from."""

    #: Names the source, and its verdicts as those of the judge ``human:NAME``.
    name: str

    def read(self, path: Path) -> Pairs:
        """Everything in a folder or file."""
        ...


class OpeningPairs:
    """OpenING's own layout: instances, ``MODEL_output`` folders beside them, and one file of battles or verdicts.

    Args:
        rows: The file of battles or verdicts; without it nobody has met yet.
    """

    name = "opening"

    def __init__(self, rows: Path | None = None) -> None:
        self.rows = rows

    def read(self, path: Path) -> Pairs:
        """See `PairSource`."""
        loaded = read_data(path)
        found = Pairs(loaded.root, loaded.instances, problems=loaded.problems)
        for folder in folders(loaded.root):
            outputs = read_outputs(folder, [each.uid for each in loaded.instances])
            found.answers[outputs.model] = outputs.answers
            found.problems += outputs.problems
        if self.rows is not None:
            found.rows = read_rows(self.rows)[0]
        return found


class MMRB2Pairs:
    """A task of Multimodal RewardBench 2 (arXiv 2512.16899): pairs with the answer that people preferred.

    Each pair is an instance of its own, which has no gold answer.
    """

    name = "mmrb2"

    def read(self, path: Path) -> Pairs:
        """See `PairSource`; ``path`` is a file such as ``interleaved.json``, pictures lie below its folder."""
        try:
            pairs = json.loads(path.read_text(encoding="utf-8"))["pairs"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise TersorError(f"{path} must be a JSON object with a list of pairs, as MMRB2 has them") from None
        found, task = Pairs(path.parent), path.stem
        topic = _MMRB2_TASKS.index(task) + 1 if task in _MMRB2_TASKS else len(_MMRB2_TASKS) + 1
        sources = sorted({str(each.get("prompt_source", "")) for each in pairs})
        for number, pair in enumerate(pairs, 1):
            where, source = f"{path}, pair {number}", str(pair.get("prompt_source", ""))
            ids = f"{topic:02}", f"{sources.index(source) + 1:02}", f"{number:04}"
            try:
                sides = [(pair[side]["model"], pair[side]["response_content"]) for side in ("response_a", "response_b")]
                inputs = self._steps(pair["prompt_content"], path.parent, where, found.problems)
                answers = [self._steps(content, path.parent, where, found.problems) for _, content in sides]
                winner = {"A": "A", "B": "B"}[str(pair["chosen"]).upper()]
            except TersorError:
                raise
            except (KeyError, TypeError, ValueError):
                said = "must have prompt_content, response_a and response_b with model and response_content, and chosen"
                raise TersorError(f"{where} {said}") from None
            names = [str(name) for name, _ in sides]
            if names[0] == names[1]:
                found.problems.append(Problem(where, "response_b.model", f"is {names[0]!r} on both sides; left out"))
                continue
            instance = Instance("".join(ids), *ids, task, source, inputs, ())
            found.instances.append(instance)
            for name, steps in zip(names, answers, strict=True):
                found.answers.setdefault(name, {})[instance.uid] = steps
            found.rows.append(Row(instance.uid, names[0], names[1], winner))
        return found

    def _steps(self, content: Any, root: Path, where: str, problems: list[Problem]) -> tuple[Step, ...]:
        """Steps of a list of kinds and values: a picture belongs to the text before it."""
        steps: list[Step] = []
        for kind, value in content:
            if kind == "text":
                steps.append(Step(str(value)))
                continue
            image: Path | None = confined(root, str(value))
            if (said := fault(root / str(value))) is not None:
                problems.append(Problem(where, "", f"{value} {said}", "warning"))
                image = None
            if steps and steps[-1].image is None:
                steps[-1] = Step(steps[-1].text, image)
            else:
                steps.append(Step("", image))
        return tuple(steps)


def take_pairs(store: Store, source: PairSource, pairs: Pairs) -> None:
    """Put what a source holds into a run: answers are copied, battles kept in order, verdicts those of people.

    Args:
        store: The run.
        source: Where the pairs are from.
        pairs: What it holds.
    """
    store.add_instances(pairs.instances, pairs.root)
    instances = {each.uid: each for each in pairs.instances}
    for model, answers in pairs.answers.items():
        folder, rows = model_folder(store.folder / ANSWERS, model), []
        for uid, steps in answers.items():
            written = write_output(folder, instances[uid], _copied(steps))
            rows.append((model, uid, written, fingerprint(folder / f"{uid}.json", written)))
        store.add_outputs(rows)
    battles = [Battle.of(row.uid, instances[row.uid].task, row.a, row.b) for row in pairs.rows]
    store.add_battles(battles)
    known, judge = {each.id: each for each in store.battles()}, f"human:{source.name}"
    raws = [
        Raw(battle.id, judge, order=0 if known[battle.id].a == row.a else 1, label=row.winner, text=row.winner)  # type: ignore[arg-type]
        for battle, row in zip(battles, pairs.rows, strict=True)
        if row.winner is not None
    ]
    if raws:
        store.add_judge(judge)
        store.record(raws).result()


def _copied(steps: Sequence[Step]) -> Answer:
    return Answer(tuple((step.text, None if step.image is None else step.image.read_bytes()) for step in steps))
