"""One replica of a cluster: the base once, its experts, an engine, and what all of that says to the ingress."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, aclosing
from typing import Any

from tersor.experts.router.routing import Route
from tersor.experts.server.app import Server
from tersor.experts.server.asking import Facts
from tersor.experts.server.endpoint import ServerSettings
from tersor.experts.server.engine import BatchStoppedError
from tersor.experts.server.errors import ApiError
from tersor.experts.server.jobs import Failure
from tersor.experts.server.metrics import Report
from tersor.experts.server.options import ServeOptions, running
from tersor.experts.server.wire import ChatRequest, CompletionRequest

#: Of an answer: an event of a stream, a whole answer, why there is none, or at the end what the log says.
Part = str | dict[str, Any] | Failure | Facts
#: Seconds that the first batch may take to start.
START = 120.0


class Replica:
    """What Serve starts as often as there are replicas.

    Args:
        options: Of the server; the ingress has seen to keys and limits.

    Raises:
        BatchStoppedError: If no batch can be started.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._open = ExitStack()
        self.server = Server(self._open.enter_context(running(options)), ServerSettings(seconds=options.timeout))
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        end = time.monotonic() + START
        while not self.server.engine.alive and time.monotonic() < end:
            time.sleep(0.01)
        self.check_health()

    async def answer(self, asked: ChatRequest | CompletionRequest) -> AsyncGenerator[Part]:
        """Answer a request whose model is the base or an expert; whoever closes this spares the rest of it."""
        facts = Facts()
        try:
            asking, _ = await self.server.ask(asked, facts)
            if asked.stream:
                async with aclosing(asking.stream()) as events:
                    async for each in events:
                        yield each
            else:
                yield await asking.whole()
        except ApiError as error:
            yield error.failure
        else:
            yield facts

    async def route(self, messages: str | Sequence[Mapping[str, Any]] | None) -> Route | Failure:
        """What the router says."""
        try:
            return await self.server.routed(messages)
        except ApiError as error:
            return error.failure

    async def models(self) -> list[dict[str, Any]]:
        """The models as OpenAI lists them; where an expert is differs between replicas, and is in their reports."""
        return [{**each, "status": None} for each in await self.server.listed()]

    async def report(self) -> tuple[str, Report]:
        """Who this is, and its report."""
        return self.name, Report.of(self.server.engine)

    async def alive(self) -> bool:
        """Whether a batch runs."""
        return self.server.engine.alive

    def check_health(self) -> None:
        """Serve calls this now and then, and starts another replica where it raises several times."""
        if not self.server.engine.alive:
            raise BatchStoppedError("no batch runs")

    def __del__(self) -> None:
        """Serve calls this before a replica ends."""
        self._open.close()
