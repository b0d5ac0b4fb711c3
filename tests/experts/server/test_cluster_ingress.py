"""The ingress before replicas that a test plays: what is sent again, what ends with an error object, what is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

pytest.importorskip("ray", reason="a cluster needs the extra cluster")

from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError, ActorUnavailableError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from tersor.experts.router.routing import Route
from tersor.experts.server import cluster_ingress as under_test
from tersor.experts.server.app import api
from tersor.experts.server.asking import Facts
from tersor.experts.server.cluster_ingress import TRIES, Cluster
from tersor.experts.server.endpoint import ServerSettings
from tersor.experts.server.jobs import Failure
from tersor.experts.server.metrics import Report

LISTED = [{"id": name, "object": "model", "status": None} for name in ("base", "add", "auto")]
WHOLE = {"id": "1", "choices": [{"text": "42"}]}
FACTS = Facts(expert="add", prompt_tokens=3, completion_tokens=2)
REPORT = Report(True, 0, 1, 0, 7, 100, (("add", "device", 50),))


class Parts:
    """What `answer` of one replica gives; an exception in it is raised."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts, self.cancelled = list(parts), False

    async def __anext__(self) -> Any:
        part = self.parts.pop(0)
        if part == "wait":
            await asyncio.sleep(60)
        if isinstance(part, BaseException):
            raise part
        return part

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Serve's handle of replicas that give these answers, one after the other."""

    def __init__(self, *answers: Sequence[Any], **said: Any) -> None:
        self.answers = [Parts(each) for each in answers]
        self.said = {"models": LISTED, "report": [("vm-1", REPORT), WorkerCrashedError()], "alive": [True], **said}
        self.asked: list[tuple[dict[str, Any], Any]] = []

    def options(self, **how: Any) -> Any:
        handle = self

        class Call:
            def remote(self, *args: Any) -> Any:
                handle.asked.append((how, args))
                if how["method_name"] == "answer":
                    return handle.answers[len([each for each, _ in handle.asked if each.get("stream")]) - 1]
                return handle._say(how["method_name"])

        return Call()

    async def _say(self, method: str) -> Any:
        found = self.said[method]
        if isinstance(found, list) and found and isinstance(found[0], BaseException):
            raise found.pop(0)
        return found[0] if isinstance(found, list) and method != "models" else found

    def broadcast(self, method: str) -> Any:
        handle = self

        class Told:
            async def results_async(self, **how: Any) -> Any:
                if isinstance(handle.said[method], BaseException):
                    raise handle.said[method]
                return handle.said[method]

        return Told()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "PAUSE", 0.0)


def client(handle: Handle, **settings: Any) -> TestClient:
    return TestClient(api(Cluster(handle, ServerSettings(**settings))), raise_server_exceptions=False)


def post(handle: Handle, stream: bool = False, **settings: Any) -> Any:
    body = {"model": "add", "prompt": "1+2=", "stream": stream}
    return client(handle, **settings).post("/v1/completions", json=body)


def code(answer: Any) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


LOST = [ActorDiedError(), ActorUnavailableError("gone", b"0" * 16), WorkerCrashedError()]


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_lost_replica_said_nothing_of_is_asked_again(error: Exception, stream: bool) -> None:
    handle = Handle([error], ["data: {}\n\n", FACTS] if stream else [WHOLE, FACTS])
    answer = post(handle, stream)
    assert answer.status_code == 200 and answer.headers["x-expert"] == "add"
    assert answer.text == "data: {}\n\n" if stream else answer.json() == WHOLE
    assert all(each.cancelled for each in handle.answers)


@pytest.mark.parametrize("name", ["batch_stopped", "no_batch", "shutting_down"])
def test_a_batch_that_stopped_is_asked_again(name: str) -> None:
    assert post(Handle([Failure(503, name, "stopped")], [WHOLE, FACTS])).json() == WHOLE


def test_what_no_replica_answers_is_503_after_some_tries() -> None:
    handle = Handle(*[[ActorDiedError()]] * (TRIES + 1))
    answer = post(handle)
    assert code(answer) == (503, "replica_lost") and answer.headers["retry-after"] == "1"
    assert len(handle.asked) == TRIES + 1, "and one for the names"


def test_a_stream_that_has_begun_ends_with_an_error_object_and_is_not_sent_again() -> None:
    handle = Handle(["data: 1\n\n", ActorDiedError()], ["data: never\n\n", FACTS])
    *begun, last = post(handle, stream=True).text.strip().split("\n\n")
    assert begun == ["data: 1"]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "replica_lost" and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BackPressureError(9, 8), (429, "queue_full")),
        (DeploymentUnavailableError("Experts"), (503, "no_replica")),
        (Failure(400, "context_length_exceeded", "too long", "prompt"), (400, "context_length_exceeded")),
        (RuntimeError("a fault"), (500, "internal_error")),
    ],
)  # fmt: skip
def test_other_errors_are_told_as_they_are_and_not_sent_again(error: Any, expected: tuple[int, str]) -> None:
    handle = Handle([error], [WHOLE, FACTS])
    assert code(post(handle)) == expected
    assert handle.answers[1].parts == [WHOLE, FACTS]


def test_a_replica_that_says_nothing_is_given_up_after_the_time_of_a_request() -> None:
    handle = Handle(["wait"])
    assert code(post(handle, seconds=0.05)) == (504, "timeout")
    assert handle.answers[0].cancelled


def test_a_reader_that_leaves_cancels_the_answer() -> None:
    handle = Handle(["data: 1\n\n", "wait"])

    async def leave() -> None:
        call = handle.options(method_name="answer", stream=True)
        events: AsyncGenerator[str] = under_test.Remote(call.remote, seconds=9, facts=Facts()).stream()
        assert await anext(events) == "data: 1\n\n"
        await events.aclose()

    asyncio.run(leave())
    assert handle.answers[0].cancelled


def test_serve_is_told_the_expert_and_the_replica_a_name_that_it_knows() -> None:
    handle = Handle([WHOLE, FACTS], [WHOLE, FACTS], route=Route("add", 0.9, {"add": 0.9}))
    made = client(handle)
    assert (
        made.post("/v1/completions", json={"model": "auto", "prompt": "1+2="}).headers["x-router-confidence"]
        == "0.9000"
    )
    assert made.post("/v1/completions", json={"model": "base", "prompt": "1+2="}).status_code == 200
    asked = [(how["multiplexed_model_id"], args[0].model) for how, args in handle.asked if how.get("stream")]
    assert asked == [("add", "add"), ("", "base")]
    assert code(made.post("/v1/completions", json={"model": "nobody", "prompt": "x"})) == (404, "model_not_found")
    assert made.post("/v1/route", json={"prompt": "1+2="}).json()["expert"] == "add"


def test_a_router_that_refuses_and_a_replica_that_is_lost_while_it_reads() -> None:
    refused = Handle(route=Failure(400, "invalid_value", "no router", "model"))
    assert code(client(refused).post("/v1/route", json={"prompt": "x"})) == (400, "invalid_value")
    again = Handle(models=LISTED, route=[ActorDiedError(), Route("add", 0.9, {})])
    assert client(again).post("/v1/route", json={"prompt": "x"}).json()["expert"] == "add"


def test_experts_cannot_be_changed_and_keys_are_needed() -> None:
    made = client(Handle(), keys=("k",))
    for path in ("load_expert", "unload_expert"):
        assert made.post(f"/v1/{path}", json={}).status_code == 401
        answer = made.post(f"/v1/{path}", json={}, headers={"authorization": "Bearer k"})
        assert code(answer) == (403, "not_allowed") and "--allow" not in answer.text


def test_health_is_good_while_one_replica_answers() -> None:
    for said, status in (
        ([False, True, WorkerCrashedError()], 200), ([False, WorkerCrashedError()], 503), (TimeoutError(), 503),
        (DeploymentUnavailableError("Experts"), 503),
    ):  # fmt: skip
        assert client(Handle(alive=said)).get("/health").status_code == status


def test_metrics_tell_replicas_apart_and_count_what_is_answered() -> None:
    made = client(Handle([WHOLE, FACTS]))
    assert made.post("/v1/completions", json={"model": "add", "prompt": "1+2="}).status_code == 200
    text = made.get("/metrics").text
    assert 'tersor_expert_bytes{expert="add",replica="vm-1",tier="device"} 50.0' in text
    assert 'tersor_ended_answers{replica="vm-1"} 7.0' in text
    assert 'tersor_requests_total{expert="add",status="200"} 1.0' in text
    assert 'tersor_tokens_total{expert="add",kind="completion"} 2.0' in text
