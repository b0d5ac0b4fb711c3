"""What a judge is: something that takes questions and has each reply recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from tersor.opening.records import Battle, Instance, Label, Status, Step


@dataclass(frozen=True)
class Question:
    """One battle in one order.

    Args:
        battle: Which.
        order: 0 where the battle's ``a`` is shown first.
        instance: What was asked.
        first: The answer that is called A.
        second: The answer that is called B.
    """

    battle: Battle
    order: Literal[0, 1]
    instance: Instance
    first: Sequence[Step]
    second: Sequence[Step]


@dataclass(frozen=True)
class Reply:
    """What became of a question; the fields are those of `Raw`."""

    status: Status
    label: Label | None = None
    probability: float | None = None
    text: str = ""
    latency: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    attempts: int = 1


#: Keeps a reply; the future is done when it is on the disk.
Record: TypeAlias = Callable[[Question, Reply], "Future[None]"]


class Judge(Protocol):
    """Who decides battles."""

    #: Names it in the store, such as ``endpoint:gpt-4o``.
    id: str
    #: Stands for all that it is shown beside the answers.
    prompt_hash: str
    #: The same in full.
    prompt_text: str
    #: What else was set, as JSON takes it; no keys.
    settings: dict[str, Any]

    def run(self, questions: Iterator[Question], record: Record) -> None:
        """Ask about each question, and record each reply; may take questions while others are open."""
        ...

    def remarks(self) -> list[str]:
        """What to say about it after a run, a line each."""
        ...
