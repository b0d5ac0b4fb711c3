"""What every server does with a request, whoever writes the answer: keys, limits, clients that leave, and the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from tersor.experts.router.routing import Route
from tersor.experts.server.asking import Facts
from tersor.experts.server.errors import ApiError, refuse
from tersor.experts.server.jobs import Failure
from tersor.experts.server.metrics import Metrics
from tersor.experts.server.wire import ChatRequest, CompletionRequest, read_body, read_request

T = TypeVar("T")
LOG = logging.getLogger("tersor.experts.server")
#: Times the limit that are read of a body that is too large.
DRAINED = 8


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a server lets in.

    Args:
        keys: One of them must be sent as a bearer token; none are needed if empty.
        hosts: See `tersor.web.app.create_app`.
        max_body: Bytes of a request.
        seconds: Time that a request may take.
        lenient: Whether fields that nobody knows are accepted.
        bank: Folder that experts may be loaded from while the server runs; None refuses it.
        log_prompts: Whether the log says what was asked.
    """

    keys: tuple[str, ...] = ()
    hosts: list[str] | None = None
    max_body: int = 4_000_000
    seconds: float = 600.0
    lenient: bool = False
    bank: Path | None = None
    log_prompts: bool = False


class EventStream(Response):
    """Events as they come; the generator is closed as soon as the client is gone."""

    def __init__(
        self, events: AsyncGenerator[str], first: str, headers: dict[str, str], done: Callable[[], None]
    ) -> None:
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._events, self._first, self._done = events, first, done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI wants it."""

        async def work() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first.encode(), "more_body": True})
            async for each in self._events:
                await send({"type": "http.response.body", "body": each.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            async with aclosing(self._events):
                await while_connected(receive, work())
        finally:
            self._done()


async def while_connected(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, which is cancelled when the client leaves; None then."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def read_limited(request: Request, limit: int) -> bytes:
    """The body.

    Raises:
        ApiError: 413, if it is larger. Some of the rest is read before, so that the client hears of it, and the
            connection is closed, so that no other request comes over it.
    """
    found, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            found += part
        elif size > DRAINED * limit:
            break
    if size > limit:
        message = f"the body is larger than the {limit:,} bytes that are let in"
        raise ApiError(Failure(413, "body_too_large", message), {"Connection": "close"})
    return bytes(found)


class Answering(Protocol):
    """The answer to one request; one of its two forms is asked for, once."""

    async def whole(self) -> dict[str, Any]:
        """In one piece.

        Raises:
            ApiError: If it failed.
        """

    def stream(self) -> AsyncGenerator[str]:
        """As events; one that fails after the first one ends with an error object.

        Raises:
            ApiError: If it failed before the first event.
        """


class Endpoint(ABC):
    """The part of a server that reads requests and says what became of them.

    Args:
        settings: What is let in.
        metrics: Counts what is answered.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self._told: set[str] = set()

    @abstractmethod
    async def ask(self, asked: ChatRequest | CompletionRequest, facts: Facts) -> tuple[Answering, dict[str, str]]:
        """What answers a request, and the headers that say who does; raises `ApiError` where nobody does."""

    @abstractmethod
    async def listed(self) -> list[dict[str, Any]]:
        """The models as OpenAI lists them."""

    @abstractmethod
    async def routed(self, messages: str | Sequence[Mapping[str, Any]] | None) -> Route:
        """What the router says of a text or a conversation; raises `ApiError` where it cannot."""

    @abstractmethod
    async def load(self, request: Request) -> Response:
        """Register an expert of the bank's folder."""

    @abstractmethod
    async def unload(self, request: Request) -> Response:
        """Forget an expert, once its requests have ended; with "force" they fail."""

    @abstractmethod
    async def alive(self) -> bool:
        """Whether requests get answers."""

    @abstractmethod
    async def measured(self) -> bytes:
        """What Prometheus reads."""

    def allow(self, given: str) -> None:
        """Check the header ``Authorization``; raises `ApiError` 401 where no key is in it."""
        token = given.removeprefix("Bearer ").strip().encode()
        right = [hmac.compare_digest(token, key.encode()) for key in self.settings.keys]
        if self.settings.keys and not any(right):
            raise refuse("send a key that the server knows as a bearer token", status=401, code="invalid_api_key")

    async def body(self, request: Request) -> bytes:
        """The body of a request whose key is right."""
        self.allow(request.headers.get("authorization", ""))
        return await read_limited(request, self.settings.max_body)

    async def complete(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        """Answer a request for text."""
        began, facts = time.monotonic(), Facts()
        raw = b""

        def done() -> None:
            self.log(request.url.path, facts, time.monotonic() - began, raw)

        try:
            raw = await self.body(request)
            asked = read_request(kind, raw, lenient=self.settings.lenient, told=self._told)
            asking, headers = await self.ask(asked, facts)
            if not asked.stream:
                whole = await while_connected(request.receive, asking.whole())
                facts.status = 499 if whole is None else 200
                done()
                return JSONResponse(whole, headers=headers)
            events = asking.stream()
            first = await while_connected(request.receive, anext(events))
            if first is None:
                await events.aclose()
                facts.status = 499
                done()
                return Response()
            return EventStream(events, first, headers, done)
        except ApiError as error:
            facts.status = error.failure.status
            done()
            raise

    async def route(self, request: Request) -> Response:
        """What the router says of a request, which nobody answers."""
        body = read_body(await self.body(request))
        if "messages" in body:
            asked = read_request(
                ChatRequest, json.dumps({"model": "auto", **body}).encode(), lenient=False, told=self._told
            )
            assert isinstance(asked, ChatRequest)  # as was asked for
            route = await self.routed(asked.turns())
        elif isinstance(body.get("prompt"), str):
            route = await self.routed(body["prompt"])
        else:
            raise refuse("give messages, or a prompt that is a text", "messages")
        return JSONResponse({"expert": route.expert or "base", "probability": route.prob, "probabilities": route.all})

    def log(self, path: str, facts: Facts, seconds: float, raw: bytes = b"") -> None:
        """Count a request, and log it in one line of JSON; what was asked is in it only where that was wanted."""
        self.metrics.answered(facts, seconds)
        line: dict[str, Any] = {
            "path": path, "status": facts.status, "expert": facts.expert, "prompt_tokens": facts.prompt_tokens,
            "completion_tokens": facts.completion_tokens, "first_token_s": facts.first_token, "seconds": seconds,
        }  # fmt: skip
        if self.settings.log_prompts:
            line["body"] = raw.decode(errors="replace")
        LOG.info(json.dumps(line))

    def who(self, name: str, route: Route | None) -> dict[str, str]:
        """Headers that say who answers, and how sure the router was, which is counted."""
        if route is None:
            return {"x-expert": name}
        self.metrics.routed(route.prob)
        return {"x-expert": name, "x-router-confidence": f"{route.prob:.4f}"}
