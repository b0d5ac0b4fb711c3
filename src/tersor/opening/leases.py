"""Which person votes on which battle: nobody is given what another one is looking at."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tersor._errors import TersorError
from tersor.opening.records import Battle, Label, Raw
from tersor.opening.store import HUMAN, Store

#: Seconds until somebody else may get the battle.
SECONDS = 600.0
_COLUMNS = 'battle.id, uid, task, a, b, annotator, lease."order", token, expires'
#: Other people who voted on a battle, or are looking at it now.
_OTHERS = """(SELECT count(*) FROM (
  SELECT substr(judge_id, 7) AS who FROM verdict WHERE battle_id = battle.id AND judge_id LIKE 'human:%' AND rep = 0
  UNION SELECT annotator FROM lease WHERE battle_id = battle.id AND expires > :now) WHERE who != :who)"""
_VOTED = "EXISTS (SELECT 1 FROM verdict WHERE battle_id = battle.id AND judge_id = 'human:' || :who AND rep = 0)"


class LeaseLostError(TersorError):
    """The time to vote is over, and somebody else has the battle."""


@dataclass(frozen=True)
class Lease:
    """One person's right to vote on one battle.

    Args:
        battle: What is shown.
        annotator: Name of the person.
        order: 0 where the battle's ``a`` is shown first; drawn once for each battle and person.
        token: Names the lease in a page, so that the page names nothing else.
        expires: Seconds since 1970.
    """

    battle: Battle
    annotator: str
    order: Literal[0, 1]
    token: str
    expires: float


def take(
    store: Store, annotator: str, *, votes: int = 1, seconds: float = SECONDS, now: float | None = None,
    only: Sequence[str] | None = None,
) -> Lease | None:  # fmt: skip
    """A battle for ``annotator``: the one that is still theirs, else the first that needs votes; None when done.

    Args:
        store: The run.
        annotator: Name of the person.
        votes: People wanted for each battle.
        seconds: How long nobody else gets it.
        now: Seconds since 1970, if not now.
        only: Battles that people are asked about, in their order; None asks about all.
    """
    now = time.time() if now is None else now
    names: dict[str, object] = {"now": now, "who": annotator, "votes": votes, "until": now + seconds}
    names["only"] = None if only is None else json.dumps(list(only))

    def job(connection: sqlite3.Connection) -> tuple[object, ...] | None:
        found = connection.execute(
            "SELECT battle.id FROM battle LEFT JOIN lease ON battle_id = battle.id AND annotator = :who "
            "LEFT JOIN json_each(:only) AS wanted ON wanted.value = battle.id "
            f"WHERE NOT {_VOTED} AND {_OTHERS} < :votes AND (:only IS NULL OR wanted.key IS NOT NULL) "
            "ORDER BY coalesce(expires, 0) <= :now, wanted.key, battle.rowid LIMIT 1",
            names,
        ).fetchone()
        if found is None:
            return None
        connection.execute(
            "INSERT INTO lease VALUES (:battle, :who, :order, :token, :until) "
            "ON CONFLICT(battle_id, annotator) DO UPDATE SET expires = :until",
            names | {"battle": found[0], "order": secrets.randbelow(2), "token": secrets.token_urlsafe(16)},
        )
        row: tuple[object, ...] = connection.execute(
            f"SELECT {_COLUMNS} FROM lease JOIN battle ON battle.id = battle_id WHERE battle_id = ? AND annotator = ?",
            (found[0], annotator),
        ).fetchone()
        return row

    return _lease(store.transact(job))


def find(store: Store, token: str) -> Lease | None:
    """The lease that a page names, expired or not."""
    rows = store.read(f"SELECT {_COLUMNS} FROM lease JOIN battle ON battle.id = battle_id WHERE token = ?", token)
    return _lease(rows[0] if rows else None)


def vote(store: Store, token: str, label: Label, *, votes: int = 1, now: float | None = None) -> Lease:
    """Record the vote of a lease; the same person's former vote on the battle is replaced.

    Args:
        store: The run.
        token: Of the lease.
        label: As shown: A is the answer that was shown first.
        votes: People wanted for each battle.
        now: Seconds since 1970, if not now.

    Raises:
        LeaseLostError: If the lease has expired, and enough others have voted or hold a lease.
        TersorError: If there is no such lease.
    """
    now = time.time() if now is None else now
    lease = find(store, token)
    if lease is None:
        raise TersorError("no such lease")
    names = {"now": now, "who": lease.annotator, "votes": votes, "battle": lease.battle.id}
    if lease.expires <= now:
        query = f"SELECT {_VOTED} OR {_OTHERS} < :votes FROM battle WHERE id = :battle"
        if not store.transact(lambda connection: connection.execute(query, names).fetchone())[0]:
            raise LeaseLostError("the time for this battle is over, and somebody else has it; take the next one")
    judge = f"{HUMAN}:{lease.annotator}"
    if not store.prompts(judge):
        store.add_judge(judge)
    store.record(Raw(lease.battle.id, judge, order=lease.order, label=label, time=now)).result()
    return lease


def _lease(row: tuple[object, ...] | None) -> Lease | None:
    if row is None:
        return None
    *battle, annotator, order, token, expires = row
    return Lease(Battle(*battle), annotator, order, token, expires)  # type: ignore[arg-type]
