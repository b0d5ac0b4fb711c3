"""A judge over all battles of a run: goes on where it stopped, never asks twice, never mixes prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from tersor._errors import TersorError
from tersor.opening.judging.base import Judge, Question, Reply
from tersor.opening.outputs import ANSWERS, fingerprint, model_folder
from tersor.opening.records import Battle, Label, Raw, Step
from tersor.opening.store import Store

Orders: TypeAlias = Literal["both", "one"]
#: Rows that may be on their way to the disk.
_MOST_PENDING = 64


@dataclass
class Outcome:
    """What a judge has said so far about a run.

    Args:
        battles: Battles that can be judged.
        decided: Those with a label in every order.
        statuses: Rows by status.
        asked: Questions of this call.
        skipped: Battles of which an answer is missing.
    """

    battles: int
    decided: int
    statuses: dict[str, int] = field(default_factory=dict)
    asked: int = 0
    skipped: int = 0

    @property
    def missing(self) -> float:
        """Share of battles without a label."""
        return 1 - self.decided / self.battles if self.battles else 0.0


def run_judge(
    store: Store, judge: Judge, *, orders: Orders = "both", rep: int = 0, empty_loses: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Outcome:  # fmt: skip
    """Have a judge decide every battle that it has not decided yet.

    Rows of status ``error`` are asked again; everything else that is recorded stays as it is.

    Args:
        store: The run.
        judge: Who decides.
        orders: Whether each battle is shown in both orders, or as it was sampled.
        rep: Number of the repetition; another one asks everything again.
        empty_loses: Decide against an empty answer without asking.
        on_progress: Told how many rows are on the disk, and of how many.

    Raises:
        TersorError: If another process judges this run, or there are no battles.
    """
    if not (battles := store.battles()):
        raise TersorError(f"{store.folder} has no battles; sample them with: tersor opening sample {store.folder}")
    with store.exclusive("judge"):
        if orders == "one" and store.orders(judge.id, judge.prompt_hash) == "both":
            raise TersorError(f"judge {judge.id} was asked in both orders on {store.folder}; go on with --orders both")
        store.add_judge(
            judge.id, prompt_hash=judge.prompt_hash, prompt=judge.prompt_text, orders=orders, settings=judge.settings
        )
        answers = {model: store.outputs(model) for model in store.models()}
        missing_loses = bool(store.get("missing_loses", False))
        instances = {each.uid: each for each in store.instances()}
        able = [
            each for each in battles
            if each.uid in instances
            and (missing_loses or all(each.uid in answers.get(model, {}) for model in (each.a, each.b)))
        ]  # fmt: skip
        wanted = [(each, order) for each in able for order in ((0, 1) if orders == "both" else (0,))]
        done = {
            (row.battle, row.order)
            for row in store.raw(judge.id, prompt=judge.prompt_hash, rep=rep)
            if row.status != "error"
        }
        todo = [(battle, order) for battle, order in wanted if (battle.id, order) not in done]
        pending: list[Future[None]] = []
        count = len(wanted) - len(todo)

        def settle() -> None:
            nonlocal count
            for each in pending:
                each.result()
            count += len(pending)
            pending.clear()
            on_progress(count, len(wanted))

        def record(question: Question, reply: Reply) -> Future[None]:
            row = Raw(question.battle.id, judge.id, judge.prompt_hash, question.order, rep, **vars(reply))
            future = store.record(row)
            pending.append(future)
            if len(pending) >= _MOST_PENDING:
                settle()
            return future

        def questions() -> Iterator[Question]:
            for battle, order in todo:
                shown = (battle.a, battle.b) if order == 0 else (battle.b, battle.a)
                first, second = (answers.get(model, {}).get(battle.uid) for model in shown)
                question = Question(battle, order, instances[battle.uid], first or (), second or ())  # type: ignore[arg-type]
                label = _without_asking(first, second, empty_loses)
                if label is None:
                    yield question
                else:
                    record(question, Reply("empty", label, text="an answer is empty or missing"))

        judge.run(questions(), record)
        settle()
    return outcome(store, judge, orders, rep, able, asked=len(todo), skipped=len(battles) - len(able))


def outcome(
    store: Store, judge: Judge, orders: Orders, rep: int, battles: list[Battle], *, asked: int = 0, skipped: int = 0
) -> Outcome:
    """What a judge has said so far about ``battles``."""
    rows = store.raw(judge.id, prompt=judge.prompt_hash, rep=rep)
    labels = Counter(row.battle for row in rows if row.label is not None)
    wanted = 2 if orders == "both" else 1
    decided = sum(labels[each.id] >= wanted for each in battles)
    statuses = Counter(row.status for row in rows)
    return Outcome(len(battles), decided, dict(sorted(statuses.items())), asked, skipped)


def changed_answers(store: Store) -> list[tuple[str, str]]:
    """Models and uids whose files are no longer what they were when they were recorded."""
    found = []
    for model in store.models():
        answers, folder = store.outputs(model), model_folder(store.folder / ANSWERS, model)
        for uid, sha256 in store.hashes(model).items():
            if _fingerprint(folder / f"{uid}.json", answers[uid]) != sha256:
                found.append((model, uid))
    return found


def contestant(judge: str, models: list[str]) -> str | None:
    """The model that seems to be the judge of this id too, if one does: nobody should judge their own answers."""
    name = judge.partition(":")[2].rpartition("/")[2].casefold()
    if len(name) < 3:
        return None
    return next((each for each in models if name in each.casefold() or each.casefold() in name), None)


def _fingerprint(file: Path, steps: tuple[Step, ...]) -> str | None:
    try:
        return fingerprint(file, steps)
    except OSError:
        return None


def _without_asking(first: object, second: object, empty_loses: bool) -> Label | None:
    """The label of a question that need not be asked: a missing answer loses, an empty one where that is wanted."""
    lost = [each is None or (empty_loses and not each) for each in (first, second)]
    if not any(lost):
        return None
    return "Tie" if all(lost) else "B" if lost[0] else "A"
