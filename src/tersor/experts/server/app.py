"""The endpoints: models, completions, chat, experts that come and go, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tersor._errors import TersorError
from tersor.experts.config import ExpertBusyError, UnknownExpertError
from tersor.experts.server.asking import Asking, Facts
from tersor.experts.server.engine import is_out_of_memory
from tersor.experts.server.errors import ApiError, error_answer, refuse
from tersor.experts.server.jobs import Failure
from tersor.experts.server.metrics import Metrics
from tersor.experts.server.models import Models, Speaker
from tersor.experts.server.wire import ChatRequest, CompletionRequest, read_body, read_request
from tersor.web.app import create_app

T = TypeVar("T")
LOG = logging.getLogger("tersor.experts.server")
#: Times the limit that are read of a body that is too large.
DRAINED = 8
_GONE = {"responses": "/v1/chat/completions", "embeddings": "/v1/chat/completions or /v1/completions"}


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


class Server:
    """Answers of one server; `api` makes an app of it.

    Args:
        models: Who answers.
        settings: What is let in.
    """

    def __init__(self, models: Models, settings: ServerSettings) -> None:
        self.models, self.engine, self.settings = models, models.engine, settings
        self.metrics = Metrics(self.engine)
        self._told: set[str] = set()

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

    async def ask(self, asked: ChatRequest | CompletionRequest, facts: Facts) -> tuple[Asking, dict[str, str]]:
        """What answers a request, and the headers that say who does."""
        if isinstance(asked, ChatRequest):
            turns = asked.turns()
            speaker = await self.models.find(asked.model, turns)
            try:
                prompts = [(await asyncio.to_thread(speaker.tongue.chat, turns), "")]
            except TersorError as error:
                raise refuse(str(error), "messages") from None
        else:
            texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
            text = texts[0] if isinstance(texts[0], str) else None
            speaker = await self.models.find(asked.model, text)
            prompts = await self._prompts(speaker, texts)
        headers = {"x-expert": speaker.name}
        if speaker.route is not None:
            headers["x-router-confidence"] = f"{speaker.route.prob:.4f}"
            self.metrics.routed(speaker.route.prob)
        asking = Asking(self.engine, speaker, asked, prompts, seconds=self.settings.seconds, facts=facts)
        return asking, headers

    async def _prompts(self, speaker: Speaker, texts: list[Any]) -> list[tuple[list[int], str]]:
        if isinstance(texts[0], int):
            texts = [texts]
        if isinstance(texts[0], str):
            return [(await asyncio.to_thread(speaker.tongue.encode, text), text) for text in texts]
        return [(list(ids), speaker.tongue.decode(ids)) for ids in texts]

    async def load(self, request: Request) -> Response:
        """Register an expert of the bank's folder."""
        body = read_body(await self.body(request))
        name, place, pin = body.get("name"), body.get("path", body.get("name")), body.get("pin", False)
        folder = self._bank_folder(place)
        if not isinstance(name, str) or not isinstance(pin, bool):
            raise refuse("name must be a text, and pin true or false", "name")
        if name in self.models.names():
            raise refuse(
                f"expert {name!r} is loaded already; unload it first", "name", status=409, code="expert_exists"
            )
        try:
            await self.models.load(name, folder, pin=pin)
        except (TersorError, OSError) as error:
            raise refuse(str(error), "path") from None
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, ExpertBusyError) and not is_out_of_memory(error):
                raise
            raise ApiError(Failure(503, "out_of_memory", f"expert {name!r}: {error}", "pin")) from None
        return JSONResponse({"name": name, "status": self.models.host.tier(name)})

    async def unload(self, request: Request) -> Response:
        """Forget an expert, once its requests have ended; with "force" they fail."""
        body = read_body(await self.body(request))
        name, force = body.get("name"), body.get("force", False)
        self._bank_folder(name)
        if not isinstance(name, str) or name not in self.models.host.list_experts():
            raise refuse(f"expert {name!r} is not loaded", "name", status=404, code="model_not_found")
        if name in self.models.leaving:
            raise refuse(f"expert {name!r} is being unloaded", "name", status=409, code="expert_unloading")
        self.models.leaving.add(name)
        try:
            deadline = time.monotonic() + self.settings.seconds
            while True:
                users = self.engine.users(name)
                for job in users if force else ():
                    job.finish(Failure(503, "expert_unloaded", f"expert {name!r} was unloaded", "model"))
                    self.engine.cancel(job)
                if not users:
                    try:
                        self.models.host.unload_expert(name)
                        return JSONResponse({"name": name, "status": "unloaded"})
                    except ExpertBusyError:  # a batch of it is just ending, or it is on its way to the device
                        pass
                if time.monotonic() > deadline:
                    raise refuse(f"expert {name!r} still answers requests", "name", status=409, code="expert_busy")
                await asyncio.sleep(0.02)
        except UnknownExpertError:
            raise refuse(f"expert {name!r} is not loaded", "name", status=404, code="model_not_found") from None
        finally:
            self.models.leaving.discard(name)

    async def route(self, request: Request) -> Response:
        """What the router says of a request, which nobody answers."""
        body = read_body(await self.body(request))
        if "messages" in body:
            asked = read_request(
                ChatRequest, json.dumps({"model": "auto", **body}).encode(), lenient=False, told=self._told
            )
            assert isinstance(asked, ChatRequest)  # as was asked for
            route = await self.models.route(asked.turns())
        elif isinstance(body.get("prompt"), str):
            route = await self.models.route(body["prompt"])
        else:
            raise refuse("give messages, or a prompt that is a text", "messages")
        return JSONResponse({"expert": route.expert or "base", "probability": route.prob, "probabilities": route.all})

    def _bank_folder(self, place: object) -> Path:
        bank = self.settings.bank
        if bank is None:
            raise refuse(
                "experts cannot be changed here: start the server with --allow-runtime-updates", status=403,
                code="not_allowed",
            )  # fmt: skip
        if not isinstance(place, str) or "\0" in place or not (bank / place).resolve().is_relative_to(bank.resolve()):
            raise refuse("path must be a folder below the bank", "path")
        return bank / place

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


def api(server: Server) -> Any:
    """The app of a server."""
    app = create_app(hosts=server.settings.hosts, extra="serve")

    def schema(kind: Any) -> dict[str, Any]:
        found = kind.model_json_schema()
        options = found.pop("$defs")["StreamOptions"]  # what stands alone refers to nothing
        found["properties"]["stream_options"] = {"anyOf": [options, {"type": "null"}]}
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": found}}}}

    named = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    plain = {"requestBody": {"required": True, "content": {"application/json": {"schema": named}}}}

    @app.exception_handler(ApiError)  # type: ignore[untyped-decorator]
    async def failed(request: Request, error: ApiError) -> Response:
        return error_answer(error)

    @app.exception_handler(HTTPException)  # type: ignore[untyped-decorator]
    async def unknown(request: Request, error: HTTPException) -> Response:
        other = _GONE.get(request.url.path.removeprefix("/v1/").strip("/"))
        hint = f": ask {other}" if other else ""
        message = f"{request.method} {request.url.path}: {error.detail}{hint}"
        return error_answer(ApiError(Failure(error.status_code, "not_found", message), dict(error.headers or {})))

    @app.exception_handler(Exception)  # type: ignore[untyped-decorator]
    async def fault(request: Request, error: Exception) -> Response:
        LOG.error("%s: %s", request.url.path, error, exc_info=error)
        return error_answer(ApiError(Failure(500, "internal_error", "an error of the server; its log says more")))

    @app.get("/v1/models")  # type: ignore[untyped-decorator]
    async def models(request: Request) -> Response:
        server.allow(request.headers.get("authorization", ""))
        return JSONResponse({"object": "list", "data": server.models.listed()})

    @app.get("/v1/models/{name}")  # type: ignore[untyped-decorator]
    async def model(request: Request, name: str) -> Response:
        server.allow(request.headers.get("authorization", ""))
        for each in server.models.listed():
            if each["id"] == name:
                return JSONResponse(each)
        raise refuse(f"the model {name!r} does not exist", "model", status=404, code="model_not_found")

    @app.post("/v1/chat/completions", openapi_extra=schema(ChatRequest))  # type: ignore[untyped-decorator]
    async def chat(request: Request) -> Response:
        return await server.complete(request, ChatRequest)

    @app.post("/v1/completions", openapi_extra=schema(CompletionRequest))  # type: ignore[untyped-decorator]
    async def completions(request: Request) -> Response:
        return await server.complete(request, CompletionRequest)

    @app.post("/v1/load_expert", openapi_extra=plain)  # type: ignore[untyped-decorator]
    async def load(request: Request) -> Response:
        return await server.load(request)

    @app.post("/v1/unload_expert", openapi_extra=plain)  # type: ignore[untyped-decorator]
    async def unload(request: Request) -> Response:
        return await server.unload(request)

    @app.post("/v1/route", openapi_extra=schema(ChatRequest))  # type: ignore[untyped-decorator]
    async def route(request: Request) -> Response:
        return await server.route(request)

    @app.get("/health")  # type: ignore[untyped-decorator]
    async def health() -> Response:
        alive = server.engine.alive
        return JSONResponse({"status": "ok" if alive else "no batch runs"}, 200 if alive else 503)

    @app.get("/metrics")  # type: ignore[untyped-decorator]
    async def metrics(request: Request) -> Response:
        server.allow(request.headers.get("authorization", ""))
        return Response(server.metrics.text(), headers={"content-type": server.metrics.content_type})

    @app.get("/openapi.json")  # type: ignore[untyped-decorator]
    async def document(request: Request) -> Response:
        server.allow(request.headers.get("authorization", ""))
        return JSONResponse(app.openapi())

    return app
