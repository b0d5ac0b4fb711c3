"""A folder that one run owns: the same run goes on there, any other is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tersor import _atomic
from tersor._errors import TersorError

#: What the run of a folder is about.
MARK = "run.json"


def claim(
    folder: Path, facts: dict[str, Any], *, write: bool = True, empty: bool = True, grows: Sequence[str] = ()
) -> None:
    """Say what the run in ``folder`` is about, so that only the same run goes on there.

    Args:
        folder: Made if it is not there.
        facts: Settings and inputs of the run, as JSON takes them.
        write: Whether to write them; of several processes one does.
        empty: Whether a folder that belongs to no run must hold nothing else.
        grows: Where in the facts is a number that may be larger than it was, key by key: a longer run goes on.

    Raises:
        ValueError: If the folder belongs to a run with other facts, or holds files and belongs to none.
    """
    text, mark = json.dumps(facts, indent=1) + "\n", folder / MARK
    if mark.is_file():
        try:
            known = json.loads(mark.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise TersorError(f"{mark} says nothing of its run; remove {folder}, or give another output") from None
        wanted = json.loads(text)
        longer = _number(known, grows) < _number(wanted, grows)
        if known != wanted and longer and _with(known, grows, _number(wanted, grows)) == wanted:
            if write:
                _atomic.write_text(mark, text)
        elif known != wanted:
            raise TersorError(
                f"{folder} belongs to another run; repeat its settings and inputs to go on, give another "
                "output, or remove it"
            )
    elif empty and folder.is_dir() and any(folder.iterdir()):
        raise TersorError(f"{folder} holds other files; give a new folder for unfinished work")
    elif write:
        _atomic.write_text(mark, text)


def _number(facts: Any, keys: Sequence[str]) -> float:
    """The number at a place in facts; -1 where there is none."""
    for key in keys:
        facts = facts.get(key) if isinstance(facts, dict) else None
    return facts if isinstance(facts, (int, float)) else -1


def _with(facts: dict[str, Any], keys: Sequence[str], value: float) -> dict[str, Any]:
    """The facts with another number at a place."""
    first, *rest = keys
    return {**facts, first: _with(facts[first], rest, value) if rest else value}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder``, which is made if it is not there; a run that dies lets go of it.

    Raises:
        ValueError: If another run is in it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows, where a folder cannot be locked
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TersorError(f"another run writes into {folder}; wait until it ends, or give another output") from None
        yield
    finally:
        os.close(handle)
        if made:
            with suppress(OSError):  # a run that was refused leaves nothing behind
                folder.rmdir()


def made_once(folder: Path, facts: dict[str, Any], make: Callable[[Path], None]) -> None:
    """Have ``make`` fill ``folder``, unless an earlier run has; it appears when it is whole.

    Raises:
        ValueError: If it was made by a run with other ``facts``; see `claim`.
    """
    if folder.is_dir():
        claim(folder, facts)
        return
    partial = folder.with_name(folder.name + ".partial")
    make(partial)
    _atomic.write_text(partial / MARK, json.dumps(facts, indent=1) + "\n")
    partial.replace(folder)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a transformers' ``Trainer`` that is whole: it writes ``trainer_state.json`` last."""
    found = {}
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            found[int(json.loads(state.read_text(encoding="utf-8"))["global_step"])] = state.parent
        except (ValueError, KeyError):  # cut off while it was written
            continue
    return found[max(found)] if found else None
