"""The page at /: experts, bytes, speed, and a box to ask in. Plain forms; no script."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import Request
from fastapi.responses import HTMLResponse, Response

from tersor.experts.server.app import Server
from tersor.experts.server.asking import Facts
from tersor.experts.server.endpoint import read_limited
from tersor.experts.server.errors import ApiError, refuse
from tersor.experts.server.models import AUTO, BASE
from tersor.experts.server.wire import ChatRequest, CompletionRequest
from tersor.web.pages import templates
from tersor.web.tokens import Signer

#: Tokens of an answer in the box at most.
TOKENS = 128
#: Letters of a question at most.
LONGEST = 4000


def add_page(app: Any, server: Server) -> None:
    """Have an app of `api` answer browsers too; where keys are needed, a key is the password."""
    environment, signer, models = templates("tersor.experts.server"), Signer(), server.models

    def allow(request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        try:
            password = base64.b64decode(given).decode().partition(":")[2] if kind == "Basic" else ""
            server.allow(password)
        except (ValueError, ApiError):
            raise ApiError(
                refuse("a key of the server is the password", status=401, code="invalid_api_key").failure,
                {"WWW-Authenticate": 'Basic realm="tersor"'},
            ) from None

    def page(status: int = 200, **said: Any) -> Response:
        report, engine = models.host.memory_report(), server.engine
        rows = [
            {"name": name, "tier": report.tiers[name], "bytes": sum(parts.values()), "running": len(engine.users(name))}
            for name, parts in report.experts.items()
        ]
        text = environment.get_template("status.html").render(
            csrf=signer.mark("form", ""), rows=rows, base=report.base, total=report.total, alive=engine.alive,
            running=len(engine.running), waiting=len(engine.waiting.jobs), restarts=engine.restarts,
            speed=server.metrics.speed(), confidence=server.metrics.confidence(), names=models.names(),
            said={"question": "", "model": AUTO if models.router else BASE, "answer": None, "wrong": None, **said},
        )  # fmt: skip
        return HTMLResponse(text, status)

    @app.get("/")  # type: ignore[untyped-decorator]
    async def status(request: Request) -> Response:
        allow(request)
        return page()

    @app.get("/static/page.css")  # type: ignore[untyped-decorator]
    async def style() -> Response:
        text = (Path(__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")
        return Response(text, media_type="text/css")

    @app.post("/")  # type: ignore[untyped-decorator]
    async def ask(request: Request) -> Response:
        allow(request)
        form = parse_qs((await read_limited(request, 20 * LONGEST)).decode(errors="replace"))
        sent: dict[str, Any] = {name: form.get(name, [""])[0] for name in ("csrf", "model", "question")}
        if sent.pop("csrf") != signer.mark("form", ""):
            return page(403, wrong="This form is too old. Nothing was asked; ask again.")
        if not sent["question"].strip() or len(sent["question"]) > LONGEST:
            return page(400, **sent, wrong=f"A question has 1 to {LONGEST} letters.")
        began, facts = time.monotonic(), Facts()
        try:
            answer = await _answer(server, sent["model"], sent["question"], facts)
        except ApiError as error:
            facts.status = error.failure.status
            return page(error.failure.status, **sent, wrong=error.failure.message)
        finally:
            server.log("/", facts, time.monotonic() - began)
        return page(**sent, **answer)


async def _answer(server: Server, model: str, question: str, facts: Facts) -> dict[str, Any]:
    """Answer, who gave it, and how sure the router was."""
    speaker = await server.models.find(model, question)
    own: dict[str, Any] = {"model": speaker.name, "max_tokens": min(TOKENS, server.engine.batcher.limit // 2)}
    request = (
        ChatRequest(**own, messages=[{"role": "user", "content": question}])
        if speaker.tongue.chats
        else CompletionRequest(**own, prompt=question)
    )
    asking, _ = await server.ask(request, facts)
    await asking.whole()
    if speaker.route is not None:
        server.metrics.routed(speaker.route.prob)
    sure = None if speaker.route is None else speaker.route.prob
    return {"answer": asking.choices[0].text, "expert": speaker.name, "sure": sure}
