"""The endpoints: models, completions, chat, experts that come and go, health, metrics; and one machine's server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tersor._errors import TersorError
from tersor.experts.config import ExpertBusyError, UnknownExpertError
from tersor.experts.router.routing import Route
from tersor.experts.server.asking import Asking, Facts
from tersor.experts.server.endpoint import LOG, Endpoint, ServerSettings
from tersor.experts.server.engine import is_out_of_memory
from tersor.experts.server.errors import ApiError, error_answer, refuse
from tersor.experts.server.jobs import Failure
from tersor.experts.server.metrics import Metrics, Report
from tersor.experts.server.models import Models, Speaker
from tersor.experts.server.wire import ChatRequest, CompletionRequest, read_body
from tersor.web.app import create_app

_GONE = {"responses": "/v1/chat/completions", "embeddings": "/v1/chat/completions or /v1/completions"}


class Server(Endpoint):
    """The server of one machine; `api` makes an app of it.

    Args:
        models: Who answers.
        settings: What is let in.
    """

    def __init__(self, models: Models, settings: ServerSettings) -> None:
        self.models, self.engine = models, models.engine
        super().__init__(settings, Metrics(lambda: {(): Report.of(self.engine)}))

    async def ask(self, asked: ChatRequest | CompletionRequest, facts: Facts) -> tuple[Asking, dict[str, str]]:
        """See `Endpoint`."""
        speaker = await self.models.find(asked.model, asked.read_by_router())
        if isinstance(asked, ChatRequest):
            try:
                prompts = [(await asyncio.to_thread(speaker.tongue.chat, asked.turns()), "")]
            except TersorError as error:
                raise refuse(str(error), "messages") from None
        else:
            prompts = await self._prompts(speaker, asked.prompts)
        asking = Asking(self.engine, speaker, asked, prompts, seconds=self.settings.seconds, facts=facts)
        return asking, self.who(speaker.name, speaker.route)

    async def _prompts(self, speaker: Speaker, texts: list[Any]) -> list[tuple[list[int], str]]:
        if isinstance(texts[0], str):
            return [(await asyncio.to_thread(speaker.tongue.encode, text), text) for text in texts]
        return [(list(ids), speaker.tongue.decode(ids)) for ids in texts]

    async def listed(self) -> list[dict[str, Any]]:
        """See `Endpoint`."""
        return self.models.listed()

    async def routed(self, messages: str | Sequence[Mapping[str, Any]] | None) -> Route:
        """See `Endpoint`."""
        return await self.models.route(messages)

    async def alive(self) -> bool:
        """See `Endpoint`."""
        return self.engine.alive

    async def measured(self) -> bytes:
        """See `Endpoint`."""
        return self.metrics.text()

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


def api(server: Endpoint) -> Any:
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
        return JSONResponse({"object": "list", "data": await server.listed()})

    @app.get("/v1/models/{name}")  # type: ignore[untyped-decorator]
    async def model(request: Request, name: str) -> Response:
        server.allow(request.headers.get("authorization", ""))
        for each in await server.listed():
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
        alive = await server.alive()
        return JSONResponse({"status": "ok" if alive else "no batch runs"}, 200 if alive else 503)

    @app.get("/metrics")  # type: ignore[untyped-decorator]
    async def metrics(request: Request) -> Response:
        server.allow(request.headers.get("authorization", ""))
        return Response(await server.measured(), headers={"content-type": server.metrics.content_type})

    @app.get("/openapi.json")  # type: ignore[untyped-decorator]
    async def document(request: Request) -> Response:
        server.allow(request.headers.get("authorization", ""))
        return JSONResponse(app.openapi())

    return app
