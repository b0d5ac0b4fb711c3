"""The run's file: instances, answers, battles, verdicts and leases in SQLite."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import astuple, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from tersor._errors import TersorError
from tersor.opening.database import Database
from tersor.opening.records import (
    Battle,
    Instance,
    Raw,
    Score,
    Step,
    Verdict,
    consensus,
    from_both_orders,
    from_one_order,
)

#: Name of the file in a run's folder.
FILE = "arena.sqlite"
#: The judge that all people together are.
HUMAN = "human"
#: Before the ids of several judges that decide by majority.
PANEL = "panel:"
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS run(key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS instance(uid TEXT PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS output(model TEXT, uid TEXT,
  steps TEXT NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY(model, uid));
CREATE TABLE IF NOT EXISTS battle(id TEXT PRIMARY KEY, uid TEXT NOT NULL,
  task TEXT NOT NULL, a TEXT NOT NULL, b TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS judge(id TEXT, prompt_hash TEXT,
  prompt TEXT NOT NULL, orders TEXT NOT NULL, settings TEXT NOT NULL,
  PRIMARY KEY(id, prompt_hash));
CREATE TABLE IF NOT EXISTS verdict(battle_id TEXT, judge_id TEXT, prompt_hash TEXT, "order" INTEGER, rep INTEGER,
  status TEXT NOT NULL, label TEXT, probability REAL, raw TEXT NOT NULL, latency REAL, tokens_in INTEGER,
  tokens_out INTEGER, attempts INTEGER NOT NULL, ts REAL NOT NULL,
  PRIMARY KEY(battle_id, judge_id, prompt_hash, "order", rep));
CREATE TABLE IF NOT EXISTS score(judge_id TEXT, model TEXT, uid TEXT, points TEXT NOT NULL,
  PRIMARY KEY(judge_id, model, uid));
CREATE INDEX IF NOT EXISTS verdict_judge ON verdict(judge_id, prompt_hash, rep);
CREATE TABLE IF NOT EXISTS lease(battle_id TEXT, annotator TEXT, "order" INTEGER NOT NULL, token TEXT UNIQUE NOT NULL,
  expires REAL NOT NULL, PRIMARY KEY(battle_id, annotator));
"""


class Store(Database):
    """The file of a run; open it with `Store.open`, and close it, or use it in a ``with`` statement.

    It may be used from several threads, and by several processes at once. A verdict is on the disk before anybody is
    told that it is recorded.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / FILE)
        self.folder = folder

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False) -> Store:
        """The store of a run.

        Args:
            path: The run's folder, or the file in it.
            create: Make it where there is none.

        Raises:
            TersorError: If there is no run, or the file is none of this version of tersor.
        """
        folder = Path(path)
        folder = folder.parent if folder.name == FILE else folder
        store = cls(folder)
        if not store.file.is_file():
            if not create:
                raise TersorError(f"{folder} holds no run; make one with: tersor opening init {folder} --mini")
            folder.mkdir(parents=True, exist_ok=True)
        if create:
            store.submit(_make).result()
        try:
            version = store.get("version")
        except sqlite3.Error:
            version = None
        if version != _VERSION:
            store.close()
            raise TersorError(f"{store.file} is no run that this version of tersor can read")
        return store

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # What the run is about

    def get(self, key: str, default: Any = None) -> Any:
        """A fact about the run."""
        row = self.read("SELECT value FROM run WHERE key = ?", key)
        return json.loads(row[0][0]) if row else default

    def set(self, key: str, value: Any) -> None:
        """Keep a fact about the run, as JSON takes it."""
        self.write("INSERT OR REPLACE INTO run VALUES (?, ?)", [(key, json.dumps(value))])

    # Instances and answers

    def add_instances(self, instances: Iterable[Instance], root: Path) -> None:
        """Keep instances; those of the same uid are replaced.

        Args:
            instances: What is asked.
            root: Folder that their pictures lie in.
        """
        self.set("root", str(root.resolve()))
        rows = [(each.uid, json.dumps(_instance_to_json(each, root))) for each in instances]
        self.write("INSERT OR REPLACE INTO instance VALUES (?, ?)", rows)

    def instances(self) -> list[Instance]:
        """All instances by uid."""
        root = Path(self.get("root", "."))
        rows = self.read("SELECT record FROM instance ORDER BY uid")
        return [_instance_from_json(json.loads(row[0]), root) for row in rows]

    def other_instances(self, instances: Iterable[Instance], root: Path) -> list[str]:
        """uids of the run that ``instances`` lack, or have with another content."""
        given = {each.uid: json.dumps(_instance_to_json(each, root)) for each in instances}
        rows = self.read("SELECT uid, record FROM instance ORDER BY uid")
        return [uid for uid, record in rows if given.get(uid) != record]

    def add_output(self, model: str, uid: str, steps: Sequence[Step], sha256: str) -> None:
        """Keep that ``model`` answered ``uid``; a former answer is replaced.

        Args:
            model: Its name.
            uid: Of the instance.
            steps: The answer, its pictures within the run's folder.
            sha256: Over the file of the answer and its pictures.
        """
        self.add_outputs([(model, uid, steps, sha256)])

    def add_outputs(self, outputs: Iterable[tuple[str, str, Sequence[Step], str]]) -> None:
        """`add_output` for many at once.

        Raises:
            TersorError: If an answer changes on which there are verdicts, or names differ in case alone.
        """
        rows = [(model, uid, json.dumps(_steps_to_json(steps, self.folder)), sha) for model, uid, steps, sha in outputs]
        names = {name.casefold(): name for name in self.models()}
        for model in {row[0] for row in rows}:
            if (known := names.setdefault(model.casefold(), model)) != model:
                raise TersorError(f"model {model!r} differs from {known!r} only in case; give it another name")
        before = {model: self.hashes(model) for model in {row[0] for row in rows}}
        other = [row for row in rows if before[row[0]].get(row[1], row[3]) != row[3]]
        if changed := sorted({row[:2] for row in other} & self._judged()) if other else []:
            raise TersorError(
                f"{len(changed)} answers with verdicts on them were changed, first {' '.join(changed[0])}; take them "
                "with: tersor opening judge --rejudge-changed, which forgets those verdicts"
            )
        self.write("DELETE FROM score WHERE model = ? AND uid = ?", [row[:2] for row in other])
        self.write("INSERT OR REPLACE INTO output VALUES (?, ?, ?, ?)", rows)

    def models(self) -> list[str]:
        """Names of all that answered, sorted."""
        return [row[0] for row in self.read("SELECT DISTINCT model FROM output ORDER BY model")]

    def outputs(self, model: str) -> dict[str, tuple[Step, ...]]:
        """uid -> answer of ``model``."""
        rows = self.read("SELECT uid, steps FROM output WHERE model = ? ORDER BY uid", model)
        return {uid: _steps_from_json(json.loads(steps), self.folder) for uid, steps in rows}

    def hashes(self, model: str) -> dict[str, str]:
        """uid -> sha256 of the answer as it was when it was recorded."""
        return dict(self.read("SELECT uid, sha256 FROM output WHERE model = ? ORDER BY uid", model))

    # Battles

    def add_battles(self, battles: Iterable[Battle]) -> int:
        """Keep battles that are new, after those that are there; returns how many were new."""
        known = {row[0] for row in self.read("SELECT id FROM battle")}
        new = {each.id: astuple(each) for each in battles if each.id not in known}
        self.write("INSERT OR IGNORE INTO battle VALUES (?, ?, ?, ?, ?)", list(new.values()))
        return len(new)

    def battles(self) -> list[Battle]:
        """All battles in the order in which they were sampled."""
        return [Battle(*row) for row in self.read("SELECT id, uid, task, a, b FROM battle ORDER BY rowid")]

    # Judges and verdicts

    def add_judge(
        self, judge: str, *, prompt_hash: str = "", prompt: str = "", orders: str = "one", settings: Any = None
    ) -> None:
        """Keep who judges, and with what words.

        Args:
            judge: Its id.
            prompt_hash: Stands for the prompt in every row.
            prompt: The whole prompt.
            orders: 'both' or 'one'; of a judge that was ever asked in both, only battles with both labels count.
            settings: What else was set, as JSON takes it; no keys.
        """
        orders = "both" if self.orders(judge, prompt_hash) == "both" else orders
        row = (judge, prompt_hash, prompt, orders, json.dumps(settings or {}))
        self.write("INSERT OR REPLACE INTO judge VALUES (?, ?, ?, ?, ?)", [row])

    def judges(self) -> list[str]:
        """Ids of all judges, and 'human' where people voted, sorted."""
        found = {row[0] for row in self.read("SELECT id FROM judge")}
        return sorted(found | ({HUMAN} if any(each.startswith(f"{HUMAN}:") for each in found) else set()))

    def orders(self, judge: str, prompt_hash: str) -> str | None:
        """'both' or 'one', as a judge was asked; None if it was not asked yet."""
        rows = self.read("SELECT orders FROM judge WHERE id = ? AND prompt_hash = ?", judge, prompt_hash)
        return rows[0][0] if rows else None

    def prompts(self, judge: str) -> dict[str, str]:
        """Hash -> text of each prompt that the judge was asked with."""
        return dict(self.read("SELECT prompt_hash, prompt FROM judge WHERE id = ? ORDER BY prompt_hash", judge))

    def settings(self, judge: str, prompt_hash: str) -> Any:
        """What else was set for a judge."""
        rows = self.read("SELECT settings FROM judge WHERE id = ? AND prompt_hash = ?", judge, prompt_hash)
        return json.loads(rows[0][0]) if rows else {}

    def record(self, rows: Raw | Sequence[Raw]) -> Future[None]:
        """Keep rows; a former row of the same question is replaced. The future is done when they are on the disk."""
        now = time.time()
        values = []
        for each in [rows] if isinstance(rows, Raw) else rows:
            if each.label is None and each.status in ("ok", "empty"):
                raise TersorError(f"verdict on {each.battle} of status {each.status} has no label")
            values.append((*list(vars(each).values())[:-1], each.time or now))
        return self.submit_rows(f"INSERT OR REPLACE INTO verdict VALUES ({', '.join('?' * len(fields(Raw)))})", values)

    def raw(self, judge: str, *, prompt: str | None = None, rep: int | None = None) -> list[Raw]:
        """Every row of a judge, in the order of the battles.

        Args:
            judge: Its id.
            prompt: Hash of a prompt; of all where left out.
            rep: A repetition; all where left out.
        """
        rows = self.read(
            "SELECT verdict.* FROM verdict LEFT JOIN battle ON battle.id = battle_id WHERE judge_id = ?1 AND "
            '(?2 IS NULL OR prompt_hash = ?2) AND (?3 IS NULL OR rep = ?3) ORDER BY battle.rowid, rep, "order"',
            judge, prompt, rep,
        )  # fmt: skip
        return [Raw(*row) for row in rows]

    def members(self, judge: str) -> list[str]:
        """Whose words a judge's are: those of all people, of a panel, or its own."""
        if judge == HUMAN:
            return [each for each in self.judges() if each.startswith(f"{HUMAN}:")]
        return judge.removeprefix(PANEL).split("+") if judge.startswith(PANEL) else [judge]

    def verdicts(self, judge: str, *, prompt: str | None = None, rep: int = 0) -> list[Verdict]:
        """The final word of a judge on every battle that it decided, in the order of the battles.

        Args:
            judge: Its id; 'human' is the consensus of all people, 'panel:ONE+TWO' that of judges.
            prompt: Hash of a prompt, needed where the judge was asked with several.
            rep: Repetition.

        Raises:
            TersorError: If there is no such judge, or it was asked with several prompts and none is named.
        """
        if (members := self.members(judge)) != [judge]:
            return consensus([each for who in members for each in self.verdicts(who, rep=rep)], judge)
        prompts = self.prompts(judge)
        if not prompts:
            raise TersorError(f"no judge {judge!r} in {self.folder}; there are {', '.join(self.judges()) or 'none'}")
        if prompt is None and len(prompts) > 1:
            raise TersorError(f"judge {judge!r} was asked with several prompts; choose one of {', '.join(prompts)}")
        prompt = prompt if prompt is not None else next(iter(prompts))
        orders = self.orders(judge, prompt)
        battles = {each.id: each for each in self.battles()}
        by_battle: dict[str, list[Raw]] = {}
        for row in self.raw(judge, prompt=prompt, rep=rep):
            if row.label is not None and row.battle in battles:
                by_battle.setdefault(row.battle, []).append(row)
        found = []
        for battle, rows in by_battle.items():
            if len(rows) == 2:
                found.append(from_both_orders(battles[battle], rows[0], rows[1]))
            elif orders == "one":
                found.append(from_one_order(battles[battle], rows[0]))
        return found

    def add_score(self, judge: str, score: Score) -> None:
        """Keep the points that a judge gave to one answer."""
        row = (judge, score.model, score.uid, json.dumps(score.scores))
        self.write("INSERT OR REPLACE INTO score VALUES (?, ?, ?, ?)", [row])

    def scores(self, judge: str) -> list[Score]:
        """The points of a judge, by model and uid."""
        rows = self.read("SELECT uid, model, points FROM score WHERE judge_id = ? ORDER BY model, uid", judge)
        return [
            Score(uid, model, {name: (value, why) for name, (value, why) in json.loads(points).items()})
            for uid, model, points in rows
        ]

    def _judged(self) -> frozenset[tuple[str, str]]:
        """Model and uid of every answer that was shown to a judge."""
        rows = self.read("SELECT a, b, uid FROM battle WHERE id IN (SELECT battle_id FROM verdict)")
        return frozenset((model, uid) for a, b, uid in rows for model in (a, b))

    def forget(self, battles: Iterable[str], judge: str | None = None) -> None:
        """Remove the rows of battles, of one judge or of all."""
        rows = [(battle, judge) for battle in battles]
        self.write("DELETE FROM verdict WHERE battle_id = ?1 AND (?2 IS NULL OR judge_id = ?2)", rows)


def _make(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA.split(";"):
        connection.execute(statement)
    connection.execute("INSERT OR IGNORE INTO run VALUES ('version', ?)", (json.dumps(_VERSION),))


def _instance_to_json(instance: Instance, root: Path) -> dict[str, Any]:
    names = [each.name for each in fields(Instance) if each.name not in ("inputs", "gold")]
    parts = {"inputs": _steps_to_json(instance.inputs, root), "gold": _steps_to_json(instance.gold, root)}
    return {name: getattr(instance, name) for name in names} | parts


def _instance_from_json(record: dict[str, Any], root: Path) -> Instance:
    parts = {name: _steps_from_json(record[name], root) for name in ("inputs", "gold")}
    return Instance(**(record | parts))


def _steps_to_json(steps: Sequence[Step], base: Path) -> list[list[str | None]]:
    base = base.resolve()
    return [[step.text, step.image.resolve().relative_to(base).as_posix() if step.image else None] for step in steps]


def _steps_from_json(steps: list[list[str | None]], base: Path) -> tuple[Step, ...]:
    return tuple(Step(text or "", base / image if image else None) for text, image in steps)
