"""OpenING's files of instances: one JSON object a line, pictures in folders beside it (arXiv 2411.18499, section 3)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tersor import _atomic
from tersor._errors import TersorError
from tersor.opening.pictures import confined, fault
from tersor.opening.records import Instance, Step

#: Splits in the order in which they are looked for.
FILES = ("test_data.jsonl", "dev_data.jsonl")
#: Stands for the picture in a text.
IMAGE = "<image>"
#: Between the instruction of a task and what is particular to the instance.
BEGIN = "<BEGIN>"
#: It becomes the name of files.
_UID = re.compile(r"[A-Za-z0-9][\w-]{0,63}", re.ASCII)
_IDS = {"meta_task_id": 2, "subtask_id": 2, "data_id": 3}
_NAMES = ("meta_task_name", "subtask_name")


@dataclass(frozen=True)
class Problem:
    """Something wrong in a file.

    Args:
        where: The file, with the number of the line where it has several.
        field: The field, such as ``conversations.output[2].image``; empty for the whole line.
        what: What is wrong.
        level: A record with an error is left out, one with a warning is kept.
    """

    where: str
    field: str
    what: str
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.where}: {self.field + ': ' if self.field else ''}{self.what}"


@dataclass
class Loaded:
    """Instances of a file, and what was wrong in it."""

    root: Path
    instances: list[Instance] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def errors(self) -> list[Problem]:
        """What keeps records out."""
        return [each for each in self.problems if each.level == "error"]


def read_data(path: Path, *, skip_bad: bool = False, strict: bool = False, check_images: bool = True) -> Loaded:
    """Read a file of instances.

    Args:
        path: A folder with ``test_data.jsonl`` or ``dev_data.jsonl``, or a file in such a folder.
        skip_bad: Leave bad records out and say so in the problems, instead of refusing.
        strict: A picture that is missing or broken is an error; otherwise the step goes without it.
        check_images: Read each picture to its end.

    Raises:
        TersorError: If there is no such file, or a record is bad and `skip_bad` is not set.
    """
    file = _data_file(path)
    found = Loaded(file.parent)
    seen: dict[str, tuple[int, Any]] = {}
    for number, line in enumerate(_lines(file), 1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            found.problems.append(Problem(where, "", f"is no JSON ({error})"))
            continue
        instance, problems = _parse(record, found.root, where, strict=strict, check_images=check_images)
        if instance is not None and (before := seen.get(instance.uid)) is not None:
            same = before[1] == record
            said = f"{instance.uid} is already in line {before[0]}" + ("" if same else " with other content")
            problems.append(Problem(where, "total_uid", said, "warning" if same else "error"))
            instance = None
        found.problems += problems
        if instance is not None and not any(each.level == "error" for each in problems):
            seen[instance.uid] = (number, record)
            found.instances.append(instance)
    refuse(found.errors, skip_bad)
    if not found.instances:
        raise TersorError(f"{file} holds no instance")
    return found


def refuse(errors: Sequence[Problem], skip_bad: bool) -> None:
    """Raise the first of ``errors``, unless bad records are left out."""
    if errors and not skip_bad:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise TersorError(f"{errors[0]}{more}; mend the file, or leave bad records out with --skip-bad")


def write_data(root: Path, instances: Iterable[Instance], name: str = FILES[0]) -> Path:
    """Write instances as `read_data` reads them; their pictures must lie below ``root`` already.

    Args:
        root: Folder of the file.
        instances: What to write; a text gets the mark of its picture, the first one that of its content.
        name: Of the file.
    """
    lines = [json.dumps(as_record(each, each.gold, _below(root)), ensure_ascii=False) for each in instances]
    _atomic.write_text(root / name, "\n".join(lines) + "\n")
    return root / name


def as_record(instance: Instance, output: Sequence[Step], place: Any) -> dict[str, Any]:
    """The JSON object of an instance with an answer.

    Args:
        instance: What is asked.
        output: The gold answer, or that of a model.
        place: From the file of a picture to its path in the record.
    """
    first, *rest = instance.inputs
    if BEGIN not in first.text:
        first = Step(first.text + BEGIN, first.image)
    return {
        "total_uid": instance.uid,
        **{key: getattr(instance, key) for key in (*_NAMES, *_IDS)},
        "conversations": [
            {"input": [_step_record(step, place) for step in (first, *rest)]},
            {"output": [_step_record(step, place) for step in output]},
        ],
    }


def read_steps(record: Any, part: str) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The raw steps of one part of a record, and what is wrong with them.

    Args:
        record: What JSON made of a file or line.
        part: 'input' or 'output'.

    Returns:
        Steps, each with a text and an image that may be None; and pairs of field and complaint.
    """
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or len(conversations) != 2:
        return [], [("conversations", "must be a list of an input and an output")]
    member = conversations[("input", "output").index(part)]
    if not isinstance(member, dict) or not isinstance(member.get(part), list):
        return [], [(f"conversations.{part}", "must be a list of steps")]
    steps, wrong = [], []
    for number, step in enumerate(member[part]):
        name = f"conversations.{part}[{number}]"
        if not isinstance(step, dict):
            wrong.append((name, "must be an object with text and image"))
        elif not isinstance(step.get("text"), str):
            wrong.append((f"{name}.text", "must be a text"))
        elif not isinstance(step.get("image"), (str, type(None))):
            wrong.append((f"{name}.image", "must be a path or null"))
        else:
            steps.append({"text": step["text"], "image": step.get("image") or None})
    return steps, wrong


def shown(text: str) -> str:
    """A text without the marks of pictures and content, as everybody sees it."""
    return text.replace(BEGIN, "").replace(IMAGE, "").strip()


def _parse(
    record: Any, root: Path, where: str, *, strict: bool, check_images: bool
) -> tuple[Instance | None, list[Problem]]:
    if not isinstance(record, dict):
        return None, [Problem(where, "", "must be a JSON object")]
    wrong = [
        Problem(where, key, "must be a text" if key in record else "is missing")
        for key in ("total_uid", *_NAMES, *_IDS)
        if not isinstance(record.get(key), str)
    ]
    wrong += [
        Problem(where, key, f"{record[key]!r} must be digits")
        for key in _IDS
        if isinstance(record.get(key), str) and not (record[key].isascii() and record[key].isdigit())
    ]
    if not _UID.fullmatch(str(record.get("total_uid", "0"))):
        wrong.append(Problem(where, "total_uid", f"{record['total_uid']!r} must be letters, digits, '_' and '-'"))
    parts = {}
    for part in ("input", "output"):
        parts[part], complaints = read_steps(record, part)
        wrong += [Problem(where, name, what) for name, what in complaints if all(name != each.field for each in wrong)]
    if not wrong and not parts["input"]:
        wrong.append(Problem(where, "conversations.input", "has no step"))
    if wrong:
        return None, wrong
    expected = "".join(record[key].zfill(width) for key, width in _IDS.items())
    if expected != record["total_uid"]:
        wrong.append(Problem(where, "total_uid", f"{record['total_uid']} does not fit the ids {expected}", "warning"))
    steps: dict[str, tuple[Step, ...]] = {}
    for part, raw in parts.items():
        made = []
        for number, each in enumerate(raw):
            image, complaint = _picture(root, each["image"], check_images)
            if complaint is not None:
                escapes = "leads out" in complaint
                level: Literal["error", "warning"] = "error" if strict or escapes else "warning"
                wrong.append(Problem(where, f"conversations.{part}[{number}].image", complaint, level))
            made.append(Step(shown(each["text"]), image))
        steps[part] = tuple(made)
    texts = {name: record[name] for name in (*_IDS, *_NAMES)}
    return Instance(uid=record["total_uid"], **texts, inputs=steps["input"], gold=steps["output"]), wrong


def _picture(root: Path, name: str | None, check: bool) -> tuple[Path | None, str | None]:
    """The file of a picture, or none and why."""
    if name is None:
        return None, None
    try:
        file = confined(root, name)
    except TersorError as error:
        return None, str(error)
    said = fault(file) if check else None if file.is_file() else "is missing"
    return (file, None) if said is None else (None, f"{name} {said}")


def _data_file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise TersorError(f"{path} holds neither {' nor '.join(FILES)}; give the folder of the data, or its file")


def _lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        try:
            yield from lines
        except UnicodeDecodeError:
            raise TersorError(f"{file} is no text in UTF-8") from None


def _step_record(step: Step, place: Any) -> dict[str, str | None]:
    if step.image is None:
        return {"text": step.text, "image": None}
    text = step.text if IMAGE in step.text else f"{step.text} {IMAGE}".lstrip()
    return {"text": text, "image": place(step.image)}


def _below(root: Path) -> Any:
    return lambda image: "./" + image.resolve().relative_to(root.resolve()).as_posix()
