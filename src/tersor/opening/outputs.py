"""Answers of models in OpenING's layout: a folder a model, a JSON file an instance, pictures beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from tersor import _atomic
from tersor._errors import TersorError
from tersor.opening.data import Problem, as_record, read_steps, shown
from tersor.opening.pictures import confined, fault, save_jpeg
from tersor.opening.records import Instance, Step

#: Folder of answers in a run's folder.
ANSWERS = "outputs"
#: Ending of a model's folder.
SUFFIX = "_output"
#: Characters of a model's name that a folder may have as they are.
_SAFE = " +#,@()[]="


@dataclass(frozen=True)
class Answer:
    """What a generator made: texts, and pictures that are not in a file yet.

    Args:
        steps: Pairs of a text and a picture of Pillow, or None.
    """

    steps: tuple[tuple[str, Any], ...]


@dataclass
class Outputs:
    """The answers in one model's folder.

    Args:
        model: Its name.
        answers: uid -> steps.
        hashes: uid -> sha256 over the file and its pictures.
        unknown: Files for instances that the run does not have.
        problems: What was wrong.
    """

    model: str
    answers: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def model_folder(base: Path, model: str) -> Path:
    """The folder of a model's answers; its name can be read back whatever characters it has."""
    if not model.strip() or len(model) > 100:
        raise TersorError(f"model name {model!r} must have 1 to 100 characters")
    return base / (quote(model, safe=_SAFE) + SUFFIX)


def model_name(folder: Path) -> str:
    """The name of the model whose answers a folder holds."""
    return unquote(folder.name.removesuffix(SUFFIX))


def write_output(folder: Path, instance: Instance, answer: Answer) -> tuple[Step, ...]:
    """Write an answer: pictures first, and the file that names them when they are whole.

    Args:
        folder: Of the model.
        instance: What is answered.
        answer: Texts and pictures.
    """
    steps = []
    for number, (text, picture) in enumerate(answer.steps):
        image = None
        if picture is not None:
            image = folder / f"{instance.uid}-o-{number}.jpg"
            _atomic.write_bytes(image, picture if isinstance(picture, bytes) else save_jpeg(picture))
        steps.append(Step(text, image))
    record = as_record(instance, steps, lambda image: image.name)
    # The inputs' pictures lie elsewhere; by name alone they would be looked for here.
    record["conversations"][0]["input"] = [
        {"text": step["text"], "image": None} for step in record["conversations"][0]["input"]
    ]
    _atomic.write_text(folder / f"{instance.uid}.json", json.dumps(record, ensure_ascii=False, indent=2) + "\n")
    return tuple(steps)


def finished(folder: Path, uid: str) -> tuple[Step, ...] | None:
    """The answer to an instance, if its file is whole and every picture that it names can be read."""
    file = folder / f"{uid}.json"
    if not file.is_file():
        return None
    steps, problems = _read_answer(file)
    return None if steps is None or problems else steps


def read_outputs(folder: Path, known: Iterable[str], *, model: str | None = None, strict: bool = False) -> Outputs:
    """Read every answer in a folder.

    Args:
        folder: ``<model>_output``.
        known: uids of the run; answers to others are counted, and left out.
        model: The name, if the folder's is another.
        strict: Refuse answers whose pictures are missing or broken; otherwise the step goes without.

    Raises:
        TersorError: If there is no such folder, or no answer in it.
    """
    if not folder.is_dir():
        raise TersorError(f"{folder}: no such folder of answers")
    found, wanted = Outputs(model or model_name(folder)), set(known)
    files = sorted(each for each in folder.iterdir() if each.suffix in (".json", ".jsonl"))
    if not files:
        raise TersorError(f"{folder} holds no answers: a .json file an instance, named by its uid")
    for file in files:
        if (uid := _uid(file)) not in wanted:
            found.unknown.append(uid)
            continue
        steps, problems = _read_answer(file)
        bad = steps is None or (strict and problems)
        found.problems += [
            Problem(each.where, each.field, each.what, "error" if bad else "warning") for each in problems
        ]
        if bad or steps is None:
            continue
        if uid in found.answers:
            found.problems.append(Problem(str(file), "", f"is a second answer to {uid}; it is left out", "warning"))
            continue
        found.answers[uid] = steps
        found.hashes[uid] = fingerprint(file, steps)
    return found


def fingerprint(file: Path, steps: Sequence[Step]) -> str:
    """sha256 over the file of an answer and its pictures."""
    digest = hashlib.sha256(file.read_bytes())
    for step in steps:
        digest.update(b"\x00" if step.image is None else hashlib.sha256(step.image.read_bytes()).digest())
    return digest.hexdigest()


def folders(base: Path) -> Iterator[Path]:
    """The models' folders below ``base``."""
    if base.is_dir():
        yield from sorted(each for each in base.iterdir() if each.is_dir() and each.name.endswith(SUFFIX))


def _uid(file: Path) -> str:
    try:
        uid = json.loads(file.read_bytes()).get("total_uid")
    except (ValueError, AttributeError, RecursionError):
        uid = None
    return uid if isinstance(uid, str) else file.stem


def _read_answer(file: Path) -> tuple[tuple[Step, ...] | None, list[Problem]]:
    """The steps of a file, None where it cannot be read at all, and what is wrong."""
    try:
        record = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        return None, [Problem(str(file), "", f"is no JSON ({error})")]
    if not isinstance(record, dict):
        return None, [Problem(str(file), "", "must be a JSON object")]
    raw, wrong = read_steps(record, "output")
    if wrong:
        return None, [Problem(str(file), name, what) for name, what in wrong]
    steps, problems = [], []
    for number, each in enumerate(raw):
        image = None
        if each["image"] is not None:
            name = each["image"].replace("\\", "/").rpartition("/")[2]
            try:
                image = confined(file.parent, name)
                said = fault(image)
            except TersorError as error:
                said = str(error)
            if said is not None:
                problems.append(
                    Problem(str(file), f"conversations.output[{number}].image", f"{name} {said}", "warning")
                )
                image = None
        steps.append(Step(shown(each["text"]), image))
    return tuple(steps), problems
