"""An app whose answers tell nothing of the machine, and a server that others reach only where that was asked for."""

from __future__ import annotations

import ipaddress
import re
import socket
from contextlib import suppress
from typing import Any

from tersor._errors import TersorError
from tersor._lazy import require

_PORT = re.compile(r":\d+$")
#: Of every answer: nothing is kept, nothing comes from elsewhere, no other page may show it.
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Middleware that adds `HEADERS` to every answer, and knows the server by some names only.

    Args:
        app: What answers.
        hosts: See `create_app`.
    """

    def __init__(self, app: Any, hosts: list[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI wants it; answers are sent on as they come, so that streams stay streams."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        ours = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *ours]
            await send(message)

        given = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
        if self.hosts is not None and _PORT.sub("", given).strip("[]") not in self.hosts:
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("unknown host", status_code=400)(scope, receive, sent)
        else:
            await self.app(scope, receive, sent)


def create_app(*, hosts: list[str] | None = None, extra: str = "arena") -> Any:
    """A FastAPI app without pages about itself, whose answers carry `HEADERS`.

    Args:
        hosts: Names that the browser may know the server by; all of them if None. A page of another site cannot reach
            a local server by a name of its own then (DNS rebinding).
        extra: The extra that brings FastAPI to whoever asks.

    Raises:
        MissingExtraError: Without the extra.
    """
    app: Any = require("fastapi", extra).FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, hosts=hosts)
    return app


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def known_hosts(host: str) -> list[str] | None:
    """The names of a server on ``host`` for `create_app`: those of this machine, or any where others may come."""
    return [host, "localhost", "127.0.0.1", "::1"] if is_local(host) else None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host``.

    Args:
        host: Name or address.
        port: 0 takes a free one.

    Raises:
        TersorError: If the port is taken, or the host is none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.create_server((host, port), family=family)
    except OSError as error:
        raise TersorError(
            f"--host {host} --port {port}: {error.strerror or error}; --port 0 takes a free one"
        ) from None
    return found


def serve(app: Any, listening: socket.socket, *, extra: str = "arena", grace: int | None = None) -> None:
    """Answer requests on a socket of `listen` until the process is interrupted, which is how this ends.

    Args:
        app: What answers.
        listening: Where.
        extra: The extra that brings uvicorn to whoever asks.
        grace: Seconds that requests which run may take to their end; None waits for them.
    """
    uvicorn: Any = require("uvicorn", extra)
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, date_header=False,
        timeout_graceful_shutdown=grace,
    )  # fmt: skip
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listening])


def address(listening: socket.socket) -> str:
    """The address of a socket of `listen`, as a browser takes it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
