"""The HTML report: one page that holds everything it shows and asks no server for anything."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
from markupsafe import Markup

from tersor import _atomic
from tersor._errors import TersorError
from tersor.bench.records import Record
from tersor.bench.scoreboard import by_system, explained, format_interval, format_number, format_peer, format_value

_ID = re.compile(r'\bid="([^"]+)"')
_ID_USE = re.compile(r'(href="#|url\(#)([^")]+)')


@dataclass(frozen=True)
class Figure:
    """A plot and what to see in it. ``svg`` goes into the page as it is: pass only what your own code drew.

    Raises `ValueError` if ``svg`` is not an SVG element.
    """

    svg: str
    caption: str

    def __post_init__(self) -> None:
        """Refuse what would not show."""
        if not self.svg.lstrip().startswith("<svg"):
            raise TersorError(f"svg must be text that starts with <svg; got {self.svg[:40]!r}")


@dataclass(frozen=True)
class Answer:
    """What one method said to a question; ``correct`` is None where there is no right answer."""

    method: str
    text: str
    correct: bool | None = None


@dataclass(frozen=True)
class Sample:
    """A case to look at: a passage of text, and what each method made of it.

    ``question`` and ``expected`` may be empty, as for plain continuations.
    """

    title: str
    passage: str
    answers: Sequence[Answer] = ()
    question: str = ""
    expected: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page below the scoreboard, usually one per system. All texts are plain text."""

    title: str
    intro: str
    figures: Sequence[Figure] = ()
    samples: Sequence[Sample] = ()


def write_report(path: str | os.PathLike[str], records: Sequence[Record], sections: Sequence[Section] = ()) -> None:
    """Write the page to ``path``: scoreboard, sections, how to reproduce each row, machine and versions.

    A reader sees the old page or the whole new one. Raises `ValueError` without records.
    """
    if not records:
        raise TersorError("there are no records to report; run `tersor demo` to make some")
    page = (
        _environment()
        .get_template("report.html")
        .render(
            groups=by_system(records),
            words=explained(records, "item", "quantity", "unit", "peer_name", "claim_source"),
            sections=sections,
            commands=_commands(records),
            settings=_settings(records),
        )
    )
    _atomic.write_text(path, page)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tersor.bench"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": format_number,
        "value": format_value,
        "inline_svg": _inline_svg,
    }
    environment.globals |= {"interval": format_interval, "peer": format_peer}
    return environment


def _inline_svg(svg: str, prefix: str) -> Markup:
    """The picture with ``prefix`` before each id: two pictures in one page must not refer into each other."""
    svg = _ID.sub(rf'id="{prefix}-\1"', svg)
    return Markup(_ID_USE.sub(rf"\1{prefix}-\2", svg))


def _commands(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Command -> the rows it reproduces, in order of appearance."""
    commands: dict[str, list[Record]] = {}
    for record in records:
        commands.setdefault(record.command, []).append(record)
    return commands


def _settings(records: Sequence[Record]) -> list[tuple[Mapping[str, object], Mapping[str, str]]]:
    """Every distinct pair of machine and versions; one, unless records of several runs were put together."""
    distinct = {
        json.dumps([dict(record.machine), dict(record.versions)], sort_keys=True): (
            record.machine,
            record.versions,
        )
        for record in records
    }
    return list(distinct.values())
