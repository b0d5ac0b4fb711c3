"""An app whose answers tell nothing of the machine, and a server that others reach only where that was asked for."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
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


def create_app(*, hosts: list[str] | None = None) -> Any:
    """A FastAPI app without pages about itself, whose answers carry `HEADERS`.

    Args:
        hosts: Names that the browser may know the server by; all of them if None. A page of another site cannot reach
            a local server by a name of its own then (DNS rebinding).

    Raises:
        MissingExtraError: Without the extra "arena".
    """
    app: Any = require("fastapi", "arena").FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.middleware("http")  # type: ignore[untyped-decorator]
    async def guarded(request: Any, answer: Callable[[Any], Awaitable[Any]]) -> Any:
        name = _PORT.sub("", request.headers.get("host", "")).strip("[]")
        if hosts is not None and name not in hosts:
            told = require("fastapi.responses", "arena").PlainTextResponse("unknown host", status_code=400)
        else:
            told = await answer(request)
        told.headers.update(HEADERS)
        return told

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


def serve(app: Any, listening: socket.socket) -> None:
    """Answer requests on a socket of `listen` until the process is interrupted, which is how this ends."""
    uvicorn: Any = require("uvicorn", "arena")
    settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, date_header=False)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listening])


def address(listening: socket.socket) -> str:
    """The address of a socket of `listen`, as a browser takes it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
