"""One measured claim, and the JSON-lines files that hold them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor import _atomic
from tersor._errors import TersorError, WrongTypeError

VERDICTS = ("holds", "partly", "fails", "too few to tell", "not here: needs a GPU", None)

_INTERVAL = re.compile(r"quartiles|\d+(\.\d+)?% [a-zA-Z][a-z -]*")
_NUMBERS = ("measured", "low", "high", "baseline", "peer")
_TEXTS = ("system", "item", "quantity", "model", "shapes", "command")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A paper's claim beside what was measured; every figure in docs, tables and plots is one of these.

    ``measured``, ``low``, ``high``, ``baseline`` and ``peer`` are all in ``unit``. ``measured`` is None only
    where the verdict says that it cannot be measured here.
    Raises `ValueError` or `TypeError` on anything inconsistent.
    """

    system: str
    """What the row is about: "zipcache"."""
    item: str
    """What was run: "mixed 4/2 bits, 60 % salient"."""
    quantity: str
    """What was measured: "cache compression"."""
    unit: str
    """Unit of all numbers: "x", "%", "ms", "bytes per token"; "" for a plain number."""
    claim: float | str | None
    """The paper's headline, a number in ``unit`` or its words; None where the paper has none."""
    claim_source: str | None
    """Where the paper says so: "Table 3"."""
    measured: float | None
    low: float | None
    high: float | None
    interval: str | None
    """What ``low`` and ``high`` are: "95% bootstrap" or "quartiles"; None without them."""
    baseline: float | None
    """The same quantity without the method."""
    peer: float | None
    """The same quantity for a simple alternative, which ``peer_name`` names."""
    peer_name: str | None
    n: int | None
    """How many cases or rounds ``measured`` is taken over."""
    seed: int | None
    model: str
    shapes: str
    """"trained" weights or "random" ones, and the sizes."""
    versions: Mapping[str, str]
    machine: Mapping[str, str | int | None]
    command: str
    """What reproduces the row."""
    verdict: str | None
    """One of `VERDICTS`; None for a detail that carries no claim of its own."""

    def __post_init__(self) -> None:
        """Refuse what would make a row misleading."""
        self._check_texts()
        for name in _NUMBERS:
            _check_number(name, getattr(self, name))
        if self.verdict not in VERDICTS:
            raise TersorError(f"verdict is {self.verdict!r}; allowed are {', '.join(map(repr, VERDICTS))}")
        if self.measured is None and self.verdict != "not here: needs a GPU":
            raise TersorError("measured is None; give a number, or the verdict 'not here: needs a GPU'")
        if (self.peer is None) != (self.peer_name is None):
            raise TersorError(f"peer and peer_name go together; got {self.peer!r} and {self.peer_name!r}")
        self._check_interval()
        self._check_counts()

    def to_json(self) -> str:
        """One line of JSON, fields in the order above, without a newline."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"versions": dict(self.versions), "machine": dict(self.machine)}
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read what `to_json` wrote; fields that a later version added are ignored.

        Raises `ValueError` that names the fields if one is missing (a renamed one is missing and unknown).
        """
        data = json.loads(line)
        if not isinstance(data, dict):
            raise TersorError(f"a record is a JSON object; got {type(data).__name__}")
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in data]:
            unknown = sorted(set(data) - set(names))
            raise TersorError(
                f"the record lacks {', '.join(missing)}" + (f"; unknown: {', '.join(unknown)}" if unknown else "")
            )
        return cls(**{name: data[name] for name in names})

    def _check_texts(self) -> None:
        for name in _TEXTS:
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise TersorError(f"{name} is {value!r}; give a non-empty text")
        if not isinstance(self.unit, str):
            raise WrongTypeError(f"unit is {self.unit!r}; give a text, '' for a plain number")
        if isinstance(self.claim, int | float):
            _check_number("claim", self.claim)
        for name in ("versions", "machine"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise WrongTypeError(f"{name} is {value!r}; give a mapping, as tersor.bench.measure.{name}() does")

    def _check_interval(self) -> None:
        given = [value is not None for value in (self.low, self.high, self.interval)]
        if any(given) != all(given):
            raise TersorError(
                f"low, high and interval go together; got {self.low!r}, {self.high!r} and {self.interval!r}"
            )
        if self.low is None or self.high is None or self.interval is None:
            return
        if not _INTERVAL.fullmatch(self.interval):
            raise TersorError(f"interval is {self.interval!r}; say 'quartiles', or a level and a kind: '95% bootstrap'")
        if self.measured is None or not self.low <= self.measured <= self.high:
            raise TersorError(f"low <= measured <= high must hold; got {self.low}, {self.measured}, {self.high}")

    def _check_counts(self) -> None:
        for name, least in (("n", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise TersorError(f"{name} is {value!r}; give an integer >= {least}, or None")


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write one record a line to ``path``; a reader sees the old file or the whole new one."""
    _atomic.write_text(path, "".join(record.to_json() + "\n" for record in records))


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """Records of a file that `write_jsonl` wrote; blank lines are skipped.

    Raises `ValueError` with file and line number for a line that is no record.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(line))
        except (ValueError, TypeError) as error:
            raise TersorError(f"{path}:{number}: {error}") from error
    return records


def _check_number(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongTypeError(f"{name} is {value!r} ({type(value).__name__}); give a Python number or None")
    if not math.isfinite(value):
        raise TersorError(f"{name} is {value}; a record holds finite numbers only")
