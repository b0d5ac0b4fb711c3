"""Requests for the router carry what each expert answers, and routers are trained and judged on different ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tersor.experts.bench import routing
from tersor.experts.bench.requests import draw_requests
from tersor.experts.bench.routing import evaluation_requests, route_requests, training_requests
from tersor.experts.bench.skills import SKILLS


def test_training_requests_hold_no_held_out_prompt_and_no_unseen_template() -> None:
    rows = training_requests(80)
    assert [row.expert for row in rows] == list(SKILLS) * 20
    assert all(row.right is None for row in rows)
    seen = {row.text for row in training_requests(2000)}
    for unseen in (False, True):
        held_out = draw_requests(200, seed=routing.TRAINING_SEED, unseen=unseen, held_out=True)
        assert seen.isdisjoint(row.text for row in held_out)


def test_each_request_knows_which_experts_answer_it_right(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw_requests(8, seed=1, unseen=True, held_out=True)
    # An expert here answers the requests of its own skill, and the last of all.
    monkeypatch.setattr(
        routing, "exact", lambda expert, asked: [each in expert or each is rows[-1].example for each in asked]
    )
    experts = {skill: [row.example for row in rows if row.skill == skill] for skill in SKILLS}
    requests = evaluation_requests(SimpleNamespace(experts=experts), rows)  # type: ignore[arg-type]
    for row, request in zip(rows, requests, strict=True):
        assert (request.text, request.expert) == (row.text, row.skill)
        expected = {skill: skill == row.skill or row is rows[-1] for skill in SKILLS}
        assert request.right == expected


@pytest.mark.parametrize("unseen", [False, True])
def test_both_routers_get_the_same_held_out_requests(monkeypatch: pytest.MonkeyPatch, unseen: bool) -> None:
    judged: list[tuple[Any, list]] = []
    monkeypatch.setattr(routing, "evaluate", lambda router, requests: judged.append((router, requests)) or router)
    monkeypatch.setattr(routing, "evaluation_requests", lambda family, rows: rows)
    monkeypatch.setattr(routing.Family, "load", lambda: None)
    monkeypatch.setattr(routing, "training_requests", lambda: training_requests(40))
    found = route_requests(unseen=unseen, n=12, seed=7)
    (encoder, first), (cheap, second) = judged
    assert first == second == draw_requests(12, seed=7, unseen=unseen, held_out=True)
    assert found == {"encoder": encoder, "n-grams": cheap}
    assert isinstance(cheap.scorer, routing.NGramScorer) and not isinstance(encoder.scorer, routing.NGramScorer)
    assert cheap.config is encoder.config
