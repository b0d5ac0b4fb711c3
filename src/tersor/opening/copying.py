"""Answers from elsewhere come into a run, and changed ones are noticed."""

from __future__ import annotations

from pathlib import Path

from tersor._errors import TersorError
from tersor.opening.judging.runner import changed_answers
from tersor.opening.outputs import (
    ANSWERS,
    Answer,
    Outputs,
    fingerprint,
    finished,
    model_folder,
    read_outputs,
    write_output,
)
from tersor.opening.store import Store


def copy_outputs(store: Store, folder: Path, model: str | None = None, *, strict: bool = False) -> Outputs:
    """Copy a model's answers into the run, pictures as they are, and record them.

    Args:
        store: The run.
        folder: See `tersor.opening.outputs.read_outputs`.
        model: The name, if the folder's is another.
        strict: Refuse answers whose pictures are missing or broken.
    """
    instances = {each.uid: each for each in store.instances()}
    found = read_outputs(folder, instances, model=model, strict=strict)
    target = model_folder(store.folder / ANSWERS, found.model)
    rows = []
    for uid, steps in found.answers.items():
        written = steps
        if folder.resolve() != target.resolve():
            pictures = tuple((step.text, None if step.image is None else step.image.read_bytes()) for step in steps)
            written = write_output(target, instances[uid], Answer(pictures))
        rows.append((found.model, uid, written, fingerprint(target / f"{uid}.json", written)))
    store.add_outputs(rows)
    return found


def take_changes(store: Store, *, rejudge: bool) -> None:
    """Make sure that answers are still what was judged.

    Args:
        store: The run.
        rejudge: Record the answers as they are now, and forget verdicts on them.

    Raises:
        TersorError: If some were changed and `rejudge` is not set, or one cannot be read any more.
    """
    if not (changed := changed_answers(store)):
        return
    if not rejudge:
        some = ", ".join(f"{model} {uid}" for model, uid in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise TersorError(
            f"answers were changed after they were recorded: {some}{more}; restore them, or give --rejudge-changed"
        )
    taken = []
    for model, uid in changed:
        folder = model_folder(store.folder / ANSWERS, model)
        if (steps := finished(folder, uid)) is None:
            raise TersorError(f"{folder / uid}.json cannot be read with all its pictures; restore it")
        taken.append((model, uid, steps, fingerprint(folder / f"{uid}.json", steps)))
    touched = set(changed)
    store.forget(each.id for each in store.battles() if (each.a, each.uid) in touched or (each.b, each.uid) in touched)
    store.add_outputs(taken)
