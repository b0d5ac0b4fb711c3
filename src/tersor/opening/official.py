"""Files of battles, verdicts and scores as OpenING's own scripts read and write them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tersor import _atomic
from tersor._errors import TersorError
from tersor.opening.records import LABELS, Battle, Label, Raw, Score, Verdict, flip
from tersor.opening.store import Store

_SIDE = r"(?:model\s*)?{}(?:\s+is\s+better)?"
#: Spellings that can mean nothing else.
_REPAIRS: dict[str, Label] = {
    _SIDE.format("a") + r"\.?": "A",
    _SIDE.format("b") + r"\.?": "B",
    rf"tie\s*\(\s*{_SIDE.format('a')}\s*\)": "Tie(A)",
    rf"tie\s*\(\s*{_SIDE.format('b')}\s*\)": "Tie(B)",
    r"tie\s*(?:\(\s*\))?": "Tie",
}


@dataclass(frozen=True)
class Row:
    """A battle of a file, with its winner where it has one.

    Args:
        uid: Of the instance.
        a: The model that was shown first.
        b: The other one.
        winner: As the file spells it; None in a list of battles.
    """

    uid: str
    a: str
    b: str
    winner: str | None = None


@dataclass
class Imported:
    """What became of a file of verdicts.

    Args:
        recorded: Verdicts that are in the store now.
        rejected: Spelling -> how often a label was none of the alphabet.
        repaired: Spelling -> how often it was taken for what it obviously means.
        extra: Battles that the run did not have.
        flipped: Verdicts of battles that the run has the other way round.
    """

    recorded: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    extra: int = 0
    flipped: int = 0


def read_rows(file: Path) -> tuple[list[Row], dict[str, str]]:
    """Read battles, with winners where there are some.

    Args:
        file: A JSON array of ``data_id``, ``model_A``, ``model_B`` and maybe ``winner``.

    Returns:
        The rows, and model name -> id of the file.
    """
    rows, ids = [], {}
    for number, record in enumerate(_array(file)):
        where = f"{file}[{number}]"
        names = []
        for side in ("model_A", "model_B"):
            model = record.get(side)
            if not isinstance(model, dict) or not isinstance(model.get("name"), str):
                raise TersorError(f"{where}: {side} must be an object with id and name")
            names.append(model["name"])
            ids[model["name"]] = str(model.get("id", model["name"]))
        uid, winner = record.get("data_id"), record.get("winner")
        if not isinstance(uid, str) or not isinstance(winner, (str, type(None))):
            raise TersorError(f"{where}: data_id must be a text, and winner a label")
        if names[0] == names[1]:
            raise TersorError(f"{where}: {names[0]!r} meets itself")
        rows.append(Row(uid, names[0], names[1], winner))
    return rows, ids


def write_rows(file: Path, rows: Iterable[Row], ids: dict[str, str]) -> None:
    """Write battles, or verdicts where rows have winners, as `read_rows` reads them."""

    def model(name: str) -> dict[str, str]:
        return {"id": ids.get(name, name), "name": name}

    records = []
    for row in rows:
        record: dict[str, Any] = {"data_id": row.uid, "model_A": model(row.a), "model_B": model(row.b)}
        records.append(record | ({} if row.winner is None else {"winner": row.winner}))
    _write(file, records)


def read_registry(file: Path) -> dict[str, dict[str, str]]:
    """Model name -> its ``id`` and ``github``, from an array of ``{id: {name, github}}``."""
    found = {}
    for number, record in enumerate(_array(file)):
        for key, model in record.items():
            if not isinstance(model, dict) or not isinstance(model.get("name"), str):
                raise TersorError(f"{file}[{number}].{key} must be an object with name")
            found[model["name"]] = {"id": key, "github": str(model.get("github", ""))}
    return found


def write_registry(file: Path, models: dict[str, dict[str, str]]) -> None:
    """Write what `read_registry` reads."""
    _write(file, [{each["id"]: {"name": name, "github": each["github"]}} for name, each in models.items()])


def read_scores(file: Path) -> tuple[list[Score], dict[str, str]]:
    """Scores of single answers, and model name -> id of the file."""
    found, ids = [], {}
    for number, record in enumerate(_array(file)):
        uid, model, scores = record.get("data_id", record.get("instance_id")), record.get("model"), record.get("score")
        if not isinstance(uid, str) or not isinstance(model, dict) or not isinstance(scores, dict):
            raise TersorError(f"{file}[{number}] must have data_id or instance_id, model and score")
        try:
            read = {name: (each["Score"], str(each.get("Justification", ""))) for name, each in scores.items()}
        except (KeyError, TypeError, AttributeError):
            raise TersorError(f"{file}[{number}].score must hold objects with Score and Justification") from None
        ids[str(model["name"])] = str(model.get("id", model["name"]))
        found.append(Score(uid, str(model["name"]), read))
    return found, ids


def write_scores(file: Path, scores: Iterable[Score], ids: dict[str, str]) -> None:
    """Write what `read_scores` reads."""
    records = [
        {
            "data_id": each.uid,
            "model": {"id": ids.get(each.model, each.model), "name": each.model},
            "score": {name: {"Score": points, "Justification": why} for name, (points, why) in each.scores.items()},
        }
        for each in scores
    ]
    _write(file, records)


def mean_scores(scores: Sequence[Score]) -> dict[str, dict[str, float | int]]:
    """Model -> mean of each criterion, ``overall``, ``n`` answers and ``dropped`` ones, in its arithmetic.

    Means are rounded to two digits, and ``overall`` is the rounded mean of the rounded means. An answer without points
    for a criterion is dropped.
    """
    table: dict[str, dict[str, float | int]] = {}
    for model in sorted({each.model for each in scores}):
        own = [each for each in scores if each.model == model]
        whole = [each for each in own if all(points is not None for points, _ in each.scores.values())]
        criteria = list(dict.fromkeys(name for each in whole for name in each.scores))
        means = {}
        for name in criteria:
            points = [float(each.scores[name][0] or 0) for each in whole if name in each.scores]
            means[name] = round(sum(points) / len(points), 2)
        overall = {"overall": round(sum(means.values()) / len(means), 2)} if means else {}
        table[model] = {**means, **overall, "n": len(whole), "dropped": len(own) - len(whole)}
    return table


def import_verdicts(store: Store, file: Path, judge: str, *, repair: bool = False) -> Imported:
    """Record the verdicts of a file as those of a judge; the same file twice changes nothing.

    Args:
        store: The run; battles that it does not have are added.
        file: See `read_rows`.
        judge: Id to record them under, such as ``human:paper``.
        repair: Take misspelt labels for what they obviously mean, instead of leaving them out.
    """
    rows, ids = read_rows(file)
    store.set("registry", store.get("registry", {}) | ids)
    known, found = {each.id: each for each in store.battles()}, Imported()
    battles, raws, reps = [], [], Counter[tuple[str, int]]()
    for row in rows:
        if row.winner is None:
            raise TersorError(f"{file} has battles without a winner; sample battles, or give a file of verdicts")
        label = _label(row.winner, repair, found)
        battle = Battle.of(row.uid, f"{row.uid[:2]}.{row.uid[2:4]}", row.a, row.b)
        if battle.id not in known:
            found.extra += 1
            known[battle.id] = battle
            battles.append(battle)
        if label is None:
            continue
        order: Literal[0, 1] = 0 if known[battle.id].a == row.a else 1
        found.flipped += order
        raws.append(Raw(battle.id, judge, "", order, reps[battle.id, order], label=label, text=row.winner))
        reps[battle.id, order] += 1
    store.add_battles(battles)
    if judge not in store.judges():
        store.add_judge(judge, settings={"file": file.name})
    store.record(raws).result()
    found.recorded = len(raws)
    return found


def export_rows(store: Store, judge: str) -> list[Row]:
    """The verdicts of a judge as they were shown, row by row."""
    battles = {each.id: each for each in store.battles()}
    rows = []
    for raw in store.raw(judge):
        if raw.label is not None and raw.battle in battles:
            battle = battles[raw.battle]
            first, second = (battle.a, battle.b) if raw.order == 0 else (battle.b, battle.a)
            rows.append(Row(battle.uid, first, second, raw.label))
    return rows


def verdict_rows(verdicts: Iterable[Verdict]) -> list[Row]:
    """Final words as rows, the model that was shown first as A."""
    return [
        Row(each.uid, each.a, each.b, each.label)
        if each.first != each.b
        else Row(each.uid, each.b, each.a, flip(each.label))
        for each in verdicts
    ]


def read_verdicts(file: Path, *, repair: bool = False) -> tuple[list[Verdict], Imported]:
    """The verdicts of a file by themselves, without a run; the model called A was shown first.

    Args:
        file: See `read_rows`.
        repair: Take misspelt labels for what they obviously mean, instead of leaving them out.

    Returns:
        The verdicts, and what was left out or repaired.
    """
    found, verdicts = Imported(), []
    for row in read_rows(file)[0]:
        label = None if row.winner is None else _label(row.winner, repair, found)
        if label is not None:
            battle = Battle.of(row.uid, f"{row.uid[:2]}.{row.uid[2:4]}", row.a, row.b)
            verdicts.append(Verdict(battle.id, row.uid, battle.task, row.a, row.b, row.a, label, None, None, file.stem))
    found.recorded = len(verdicts)
    return verdicts, found


def _label(text: str, repair: bool, found: Imported) -> Label | None:
    for label in LABELS:
        if text == label:
            return label
    for pattern, label in _REPAIRS.items() if repair else ():
        if re.fullmatch(pattern, text.strip(), re.IGNORECASE):
            found.repaired[text] += 1
            return label
    found.rejected[text] += 1
    return None


def _array(file: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TersorError(f"{file} is no JSON ({error})") from None
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise TersorError(f"{file} must be an array of objects")
    return records


def _write(file: Path, records: list[Any]) -> None:
    _atomic.write_text(file, json.dumps(records, ensure_ascii=False, indent=4) + "\n")
