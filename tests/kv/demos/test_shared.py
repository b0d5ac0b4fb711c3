"""What the demos of KV methods share: the strongest peer, verdicts, records, the plot and answers really written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tersor import zoo
from tersor.bench.runs import DEMO_SEED, demo_records
from tersor.kv.bench.contenders import FULL, Contender, pick
from tersor.kv.bench.recall import Scores
from tersor.kv.bench.tasks import recall_samples
from tersor.kv.demos import shared
from tersor.kv.demos.shared import ask, quality_records, recall_plot, show_answers, strongest_peer


def scores(right: int, size: int, total: int = 100) -> Scores:
    """``right`` of 100 answers, by a cache whose dense form takes 400 bytes."""
    return Scores([1.0] * right + [0.0] * (total - right), size, 400)


RECALL = {
    FULL: scores(90, 400),
    "ours": scores(88, 100),
    "large": scores(89, 200),  # recalls more, and is no rival: it saves half as much
    "near": scores(70, 104),  # within 5 % of our compression
    "small": scores(60, 50),
}


def test_a_peer_compresses_about_as_much_and_recalls_most() -> None:
    assert strongest_peer(RECALL, "ours") == "near"
    assert strongest_peer({**RECALL, "near": scores(70, 106)}, "ours") == "small"
    assert strongest_peer({**RECALL, "small": scores(80, 50)}, "ours") == "small"


def test_records_compare_with_the_full_cache_and_the_peer() -> None:
    loss = {name: Scores([base, base + 1], 100, 400) for name, base in ((FULL, 1.0), ("ours", 1.25), ("near", 1.5))}
    lost, smaller, added = quality_records(
        demo_records("zipcache", "tiny-lm"), RECALL, loss, "ours",
        item="4/2 bits", accuracy=(-0.38, "paper A"), compression=(4.98, "paper B"),
    )  # fmt: skip
    assert (lost.item, lost.unit, lost.n) == ("4/2 bits: recall from book text", "points", 100)
    assert (lost.measured, lost.peer, lost.peer_name) == (pytest.approx(-2.0), pytest.approx(-20.0), "near")
    assert (lost.claim, lost.claim_source) == (-0.38, "paper A")
    assert lost.verdict == "too few to tell" and lost.low < -0.5 < lost.high
    assert (smaller.measured, smaller.peer, smaller.claim) == (4.0, 400 / 104, 4.98)
    assert (added.measured, added.peer, added.n, added.claim) == (0.25, 0.5, 2, None)


def test_every_task_is_asked_with_the_demo_s_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(model: Any, encode: Any, questions: list, rivals: list) -> dict[str, Any]:
        return {rival: [question.task for question in questions] for rival in rivals}

    monkeypatch.setattr(shared, "score_recall", scored)
    told: list[str] = []
    tasks, book = ("needle", "multikey_needle"), zoo.book()
    tokenizer = zoo.load("tiny-lm")[1]
    results, questions = ask(None, tokenizer, book, tasks, ["a", "b"], samples=3, on_progress=told.append)  # type: ignore[arg-type, list-item]
    assert results == {task: {"a": [task] * 3, "b": [task] * 3} for task in tasks}
    for task in tasks:
        assert questions[task] == recall_samples(task, n=3, prose=book, seed=DEMO_SEED)
    assert told == ["needle: 3 questions about the book", "multikey needle: 3 questions about the book"]


def test_the_plot_has_a_point_for_each_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}

    def plot(points: list, **options: Any) -> str:
        drawn.update(options, points=points)
        return "<svg/>"

    monkeypatch.setattr(shared, "plot_quality_vs_bytes", plot)
    rivals = [Contender(name, "family of " + name, lambda config: None) for name in ("ours", "small")]  # type: ignore[arg-type, return-value]
    assert recall_plot(RECALL, rivals).svg == "<svg/>"
    assert drawn["baseline"] == pytest.approx(90.0)
    ours, small = drawn["points"]
    assert (ours.name, ours.x, ours.y) == ("ours", 4.0, pytest.approx(88.0)) and ours.low < 88 < ours.high
    assert (small.x, small.y, small.family) == (8.0, pytest.approx(60.0), "family of small")


def test_answers_are_what_generate_writes() -> None:
    model, tokenizer = zoo.load("tiny-lm")
    sample = recall_samples("multikey_needle", n=1, prose=zoo.book(), seed=1, context_bytes=300)[0]
    rivals = pick(["uniform 2-bit"])
    shown = show_answers(model, tokenizer, sample, rivals)
    text = sample.context + sample.question + sample.answer_prefix
    ids = torch.tensor([tokenizer.encode(text)])
    written = model.generate(ids, max_new_tokens=len(sample.answer), do_sample=False)[0, ids.shape[1] :]
    assert [answer.method for answer in shown.answers] == [FULL, "uniform 2-bit"]
    assert shown.answers[0].text == tokenizer.decode(written)
    for answer in shown.answers:
        assert len(tokenizer.encode(answer.text)) == len(sample.answer)
        assert answer.correct == (answer.text == sample.answer)
    assert (shown.title, shown.passage, shown.expected) == ("multikey needle", sample.context, sample.answer)
    assert re.search(re.escape(sample.answer_prefix) + "$", shown.question)
