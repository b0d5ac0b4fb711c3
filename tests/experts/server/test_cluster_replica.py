"""A replica without Serve: parts of answers, failures that are told and not raised, and what it reports."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import NAMES, offline

from tersor import zoo
from tersor.experts.host import ExpertHost
from tersor.experts.router.routing import Route
from tersor.experts.server.asking import Facts
from tersor.experts.server.cluster_replica import Replica
from tersor.experts.server.engine import BatchStoppedError
from tersor.experts.server.jobs import Failure
from tersor.experts.server.options import ServeOptions
from tersor.experts.server.wire import CompletionRequest

PROMPT = "bdac>"


@pytest.fixture(scope="module")
def replica(bank: Path) -> Iterator[Replica]:
    router = str(zoo.path("tiny-experts") / "router")
    made = Replica(ServeOptions(bank=bank, base=str(bank.parent / "base"), router=router, places=4))
    yield made
    made._open.close()


def answer(replica: Replica, **fields: Any) -> list[Any]:
    async def all_of_it() -> list[Any]:
        asked = CompletionRequest(**{"model": "reverse", "prompt": PROMPT, "max_tokens": 12, **fields})
        return [part async for part in replica.answer(asked)]

    return asyncio.run(all_of_it())


def test_an_answer_has_its_text_and_at_its_end_what_the_log_says(replica: Replica, reference: ExpertHost) -> None:
    whole, facts = answer(replica)
    assert whole["choices"][0]["text"] == offline(reference, PROMPT, "reverse", 12)
    assert isinstance(facts, Facts) and (facts.expert, facts.prompt_tokens) == ("reverse", 5)
    *events, last = answer(replica, stream=True)
    assert events[-1] == "data: [DONE]\n\n" and last.completion_tokens == facts.completion_tokens


def test_a_failure_is_told_as_a_part(replica: Replica) -> None:
    (failure,) = answer(replica, prompt="a" * 2000)
    assert isinstance(failure, Failure) and failure.code == "context_length_exceeded"
    refused = asyncio.run(replica.route(None))
    assert isinstance(refused, Failure) and refused.status == 400


def test_whoever_closes_an_answer_frees_its_expert(replica: Replica) -> None:
    async def leave() -> None:
        asked = CompletionRequest(model="sort", prompt=PROMPT, max_tokens=400, stream=True, logit_bias={"1": -100.0})
        parts = replica.answer(asked)
        await anext(parts)
        await parts.aclose()
        for _ in range(200):
            if not replica.server.engine.users("sort"):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it is still answered")

    asyncio.run(leave())


def test_it_says_who_it_is_what_it_has_and_how_it_is(replica: Replica) -> None:
    name, report = asyncio.run(replica.report())
    assert report.alive and {each[0] for each in report.experts} == set(NAMES) and report.base > 0
    assert name.rpartition("-")[2].isdigit()
    listed = asyncio.run(replica.models())
    assert [each["id"] for each in listed] == ["base", *NAMES, "auto"] and {each["status"] for each in listed} == {None}
    found = asyncio.run(replica.route("what is 12 plus 345?"))
    assert isinstance(found, Route) and found.expert == "add"


def test_serve_hears_when_no_batch_runs(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    replica.check_health()
    monkeypatch.setattr(replica.server.engine, "_alive", False)
    with pytest.raises(BatchStoppedError):
        replica.check_health()
    assert not asyncio.run(replica.alive())
