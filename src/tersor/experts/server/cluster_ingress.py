"""The ingress of a cluster: it speaks the same format as the server of one machine, and has replicas write the answers.

Serve does not send a request again whose replica died. The ingress does, as long as nothing of the answer has come; a
stream that has begun ends with an error object.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from tersor._lazy import require
from tersor.experts.router.routing import Route
from tersor.experts.server.answers import event
from tersor.experts.server.asking import Facts
from tersor.experts.server.cluster_replica import Part
from tersor.experts.server.endpoint import Endpoint, ServerSettings
from tersor.experts.server.errors import ApiError, error_object, refuse
from tersor.experts.server.jobs import Failure
from tersor.experts.server.metrics import Metrics, Report
from tersor.experts.server.models import AUTO, BASE
from tersor.experts.server.wire import ChatRequest, CompletionRequest

#: How often a request is sent at most, and the seconds between two times.
TRIES, PAUSE = 4, 0.2
#: Seconds that replicas have to say how they are.
LOOK = 1.5
#: Failures after which another replica, or the same one a moment later, may answer.
_AGAIN = ("replica_lost", "batch_stopped", "no_batch", "shutting_down")


def failure_of(error: BaseException, seconds: float) -> Failure | None:
    """What the client is told of an error of Ray or Serve; None if it is none of those that happen to a cluster."""
    ray, serve = require("ray.exceptions", "cluster"), require("ray.serve.exceptions", "cluster")
    if isinstance(error, serve.BackPressureError):
        return Failure(429, "queue_full", "too many requests wait already; try again in a second")
    if isinstance(error, TimeoutError):
        return Failure(504, "timeout", f"the answer took longer than {seconds:g} s; ask for fewer tokens")
    if isinstance(error, (ray.RayActorError, ray.WorkerCrashedError, ray.NodeDiedError, ray.ObjectLostError)):
        return Failure(503, "replica_lost", "the replica that was answering is lost; try again")
    if isinstance(error, serve.DeploymentUnavailableError):
        return Failure(503, "no_replica", "no replica can answer; try again later")
    return None


class Remote:
    """The answer to one request, from whichever replica gives it.

    Args:
        call: Sends the request, and returns what iterates over the parts of its answer.
        seconds: Time that all of it may take.
        facts: Filled in at the end.
    """

    def __init__(self, call: Callable[[], Any], *, seconds: float, facts: Facts) -> None:
        self._call, self._seconds, self._facts = call, seconds, facts
        self._deadline = time.monotonic() + seconds

    async def whole(self) -> dict[str, Any]:
        """See `Answering`."""
        async with aclosing(self._parts()) as parts:
            found = [part async for part in parts]
        assert isinstance(found[0], dict)  # a request without a stream has one part
        return found[0]

    async def stream(self) -> AsyncGenerator[str]:
        """See `Answering`."""
        begun = False
        try:
            async with aclosing(self._parts()) as parts:
                async for part in parts:
                    begun = True
                    yield str(part)
        except ApiError as error:
            if not begun:
                raise
            self._facts.status = error.failure.status
            yield event(error_object(error.failure))

    async def _parts(self) -> AsyncGenerator[Part]:
        """The parts; while none has come, the request is sent again."""
        for left in reversed(range(TRIES)):
            begun = False
            try:
                async with aclosing(self._once()) as parts:
                    async for part in parts:
                        begun = True
                        yield part
                return
            except ApiError as error:
                if begun or not left or error.failure.code not in _AGAIN:
                    raise
            await asyncio.sleep(PAUSE)

    async def _once(self) -> AsyncGenerator[Part]:
        response = self._call()
        try:
            while True:
                part = await asyncio.wait_for(anext(response), self._deadline - time.monotonic())
                if isinstance(part, Failure):
                    raise ApiError(part)
                if isinstance(part, Facts):
                    vars(self._facts).update(vars(part))
                    return
                yield part
        except ApiError:
            raise
        except Exception as error:
            failure = failure_of(error, self._seconds)
            if failure is None:
                raise
            raise ApiError(failure) from None
        finally:
            response.cancel()  # of one that has ended this does nothing


class Cluster(Endpoint):
    """The server of a cluster.

    Args:
        replicas: Serve's handle of `Replica`.
        settings: What is let in.
    """

    def __init__(self, replicas: Any, settings: ServerSettings) -> None:
        self.replicas = replicas
        self._reports: dict[tuple[str, ...], Report] = {}
        self._listed: list[dict[str, Any]] = []
        super().__init__(settings, Metrics(lambda: self._reports, ("replica",)))

    async def ask(self, asked: ChatRequest | CompletionRequest, facts: Facts) -> tuple[Remote, dict[str, str]]:
        """See `Endpoint`."""
        name, route = asked.model, None
        if name == AUTO:
            route = await self.routed(asked.read_by_router())
            name = route.expert or BASE
        known = [each["id"] for each in await self.listed()]
        if name not in known:
            message = f"the model {name!r} does not exist; known are {', '.join(known)}"
            raise refuse(message, "model", status=404, code="model_not_found")
        facts.expert = name
        # Serve prefers replicas that had this expert last.
        call = self.replicas.options(
            method_name="answer", stream=True, multiplexed_model_id="" if name == BASE else name
        )
        sent = asked.model_copy(update={"model": name})
        return Remote(lambda: call.remote(sent), seconds=self.settings.seconds, facts=facts), self.who(name, route)

    async def listed(self) -> list[dict[str, Any]]:
        """See `Endpoint`; they stay as they are while the cluster runs."""
        if not self._listed:
            self._listed = await self._said("models")
        return self._listed

    async def routed(self, messages: str | Sequence[Mapping[str, Any]] | None) -> Route:
        """See `Endpoint`."""
        found = await self._said("route", messages)
        if isinstance(found, Failure):
            raise ApiError(found)
        assert isinstance(found, Route)  # as `Replica.route` says
        return found

    async def load(self, request: Request) -> Response:
        """Refused: a handle of Serve reaches one replica, and those that start later would not know."""
        await self.body(request)
        message = "experts of a cluster cannot be changed: change the bank's folder, and deploy again"
        raise refuse(message, status=403, code="not_allowed")

    async def unload(self, request: Request) -> Response:
        """Refused as `load` is."""
        return await self.load(request)

    async def alive(self) -> bool:
        """Whether one replica answers at least."""
        return any(each is True for each in await self._all("alive"))

    async def measured(self) -> bytes:
        """See `Endpoint`; reports are of all replicas."""
        found = [each for each in await self._all("report") if isinstance(each, tuple)]
        self._reports = {(name,): report for name, report in found}
        return self.metrics.text()

    async def _all(self, method: str) -> list[Any]:
        """What each replica says, or the error of those that do not."""
        told = self.replicas.broadcast(method)
        with suppress(Exception):  # there is none, or not all answered in time
            return list(await told.results_async(timeout_s=LOOK, return_exceptions=True))
        return []

    async def _said(self, method: str, *args: Any) -> Any:
        """What one replica says; another one, where that is lost."""
        call, seconds = self.replicas.options(method_name=method), self.settings.seconds
        for left in reversed(range(TRIES)):
            try:
                return await asyncio.wait_for(call.remote(*args), seconds)
            except Exception as error:
                failure = failure_of(error, seconds)
                if failure is None:
                    raise
                if not left or failure.code not in _AGAIN:
                    raise ApiError(failure) from None
            await asyncio.sleep(PAUSE)
