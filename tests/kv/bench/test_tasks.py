"""Recall samples: exact lengths, one right answer, and the same samples on every machine."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tersor import zoo
from tersor.kv.bench.tasks import PLANTED, TASKS, ascii_fold, recall_samples


@pytest.fixture(scope="module")
def prose() -> str:
    return zoo.book()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("context_bytes", [192, 500, 1024])
def test_lengths_are_exact_and_constant(task: str, context_bytes: int, prose: str) -> None:
    samples = recall_samples(task, n=12, prose=prose, seed=1, context_bytes=context_bytes)
    assert {len(s.context + s.question + s.answer_prefix) for s in samples} == {context_bytes}
    assert len({(len(s.question), len(s.answer_prefix), len(s.answer)) for s in samples}) == 1
    assert all((s.context + s.question + s.answer_prefix + s.answer).isascii() for s in samples)


@pytest.mark.parametrize("task", PLANTED)
def test_one_note_answers_the_question(task: str, prose: str) -> None:
    for sample in recall_samples(task, n=20, prose=prose, seed=2):
        notes = dict(re.findall(r"\[\[([A-Z]{2})=([^\]]+)\]\]", sample.context))
        stated = re.findall(r"\[\[([A-Z]{2})=", sample.context)
        assert len(stated) == len(set(stated)) == len(notes)
        assert len(set(notes.values())) == len(notes)
        key = sample.question.removeprefix("\n{{")
        if task == "variable_tracking":
            root = notes[key]
            assert sample.answer == f"{root}={notes[root]}"
        else:
            assert sample.answer == notes[key]
        assert (len(notes) == 1) == (task == "needle")


def test_quotes_stand_once_in_the_book(prose: str) -> None:
    folded = ascii_fold(prose)
    for sample in recall_samples("quote", n=20, prose=prose, seed=3):
        shown = sample.question.removeprefix("\n{{") + sample.answer_prefix
        assert sample.context.count(shown) == 1
        assert sample.context.split(shown)[1].startswith(sample.answer)
        assert sample.context in folded


def test_needles_lie_at_every_depth(prose: str) -> None:
    samples = recall_samples("needle", n=400, prose=prose, seed=4)
    depth = np.array([s.context.index("[[") / len(s.context) for s in samples])
    counts, _ = np.histogram(depth, bins=5, range=(0, 1))
    # 400 uniform draws into five bins: 80 each with a standard deviation of 8.
    assert (abs(counts - 80) < 5 * 8).all()


def test_samples_depend_on_task_seed_and_index_only(prose: str) -> None:
    few, many = (recall_samples("multikey_needle", n=n, prose=prose, seed=5) for n in (3, 7))
    assert few == many[:3]
    assert few != recall_samples("multikey_needle", n=3, prose=prose, seed=6)


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        ({"task": "chess"}, "choose one of line_retrieval"),
        ({"n": 0}, "at least 1"),
        ({"seed": -1}, "negative"),
        ({"context_bytes": 50}, "at least 192"),
        ({"prose": "too short"}, "too short"),
    ],
)
def test_bad_requests_are_named(change: dict[str, object], mention: str, prose: str) -> None:
    request: dict[str, object] = {"task": "needle", "n": 1, "prose": prose, "seed": 0, "context_bytes": 256, **change}
    with pytest.raises(ValueError, match=mention):
        recall_samples(request.pop("task"), **request)  # type: ignore[arg-type]


def test_folding_is_idempotent_and_ascii() -> None:
    text = "“Naïve” — café…\n\n\nwith *marks*  and [links]"
    folded = ascii_fold(text)
    assert folded == '"Naive" - cafe...\nwith marks and links'
    assert ascii_fold(folded) == folded
