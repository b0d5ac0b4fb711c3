"""One request of chat completions at a time, and what its failure means."""

from __future__ import annotations

import asyncio
import functools
import os
import random
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from tersor._errors import TersorError
from tersor._lazy import require
from tersor.opening.judging.limiter import Limiter
from tersor.opening.judging.wire import BrokenReplyError, Completion, chat_url, error_text, read_completion, retry_after

#: Attempts of a request.
TRIES = 6
#: Statuses after which the same request may go well.
_BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
#: Words of a server that found a message too long.
_TOO_LARGE = ("context", "too large", "too long", "too many", "maximum", "exceed", "image size", "payload")


class EndpointRefusedError(TersorError):
    """The endpoint will not answer anything; what is recorded stays."""


@dataclass(frozen=True)
class Failure:
    """An attempt that may go well after ``wait`` seconds, or next time, or not at all."""

    why: str
    wait: float | None = None
    final: bool = False


@dataclass(frozen=True)
class TooLarge:
    """The endpoint found the message too long, or its pictures too large."""

    why: str


class ChatClient:
    """An endpoint that speaks OpenAI's chat completions.

    Args:
        base_url: With or without ``/v1`` or ``/chat/completions``.
        model: Its name there.
        key_env: Environment variable of the key; without the variable no key is sent.
        timeout: Seconds of a request.
        logprobs: Ask for the probabilities of first tokens.
    """

    def __init__(
        self, base_url: str, model: str, *, key_env: str = "OPENAI_API_KEY", timeout: float = 120.0,
        logprobs: bool = False,
    ) -> None:  # fmt: skip
        self.url, self.model, self.key_env, self.timeout = chat_url(base_url), model, key_env, timeout
        self._limit_field = "max_tokens"
        self._greedy: dict[str, Any] = {"temperature": 0}
        self._logprobs: dict[str, Any] = {"logprobs": True, "top_logprobs": 10} if logprobs else {}
        self._worked = False

    def open(self) -> Any:
        """A connection as a client of httpx2, to be used in an ``async with`` statement.

        Whoever asks several things at once opens several: a pool looks at every idle connection for each request.
        """
        httpx2: Any = require("httpx2", "arena")
        key = os.environ.get(self.key_env, "")
        return httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(self.timeout, connect=5.0),
            limits=httpx2.Limits(max_connections=1),
            verify=_tls(),
        )

    async def say(
        self, client: Any, limiter: Limiter, talk: list[dict[str, Any]], tokens: int, rng: random.Random, *,
        backoff: float = 0.5,
    ) -> Completion:  # fmt: skip
        """A completion, after several attempts where they are needed.

        Raises:
            EndpointRefusedError: If the endpoint refuses every request.
            TersorError: If it cannot answer this one.
        """
        why = ""
        for turn in range(TRIES):
            got = await self.attempt(client, limiter, talk, tokens)
            if isinstance(got, Completion):
                return got
            why = got.why
            if isinstance(got, TooLarge) or got.final:
                break
            await asyncio.sleep(got.wait if got.wait is not None else rng.uniform(0, min(30.0, backoff * 2**turn)))
        raise TersorError(f"{self.url} does not answer: {why}; run the command again to go on")

    async def attempt(
        self, client: Any, limiter: Limiter, talk: list[dict[str, Any]], tokens: int
    ) -> Completion | Failure | TooLarge:
        """One request.

        Raises:
            EndpointRefusedError: If there is no use in asking anything else.
        """
        httpx2: Any = require("httpx2", "arena")
        body = {"model": self.model, "messages": talk, self._limit_field: tokens, **self._greedy, **self._logprobs}
        async with limiter.slot() as began:
            try:
                async with asyncio.timeout(self.timeout):
                    response = await client.post(self.url, json=body)
            except (httpx2.TransportError, TimeoutError) as error:
                return Failure(f"{type(error).__name__}: {self._masked(str(error))}")
        try:
            payload = response.json()
        except ValueError:
            payload = None
        status, said = response.status_code, self._masked(error_text(payload, response.text))
        if status == 200:
            try:
                completion = read_completion(payload)
            except BrokenReplyError as error:
                return Failure(f"reply of status 200 with {error}")
            self._worked = True
            limiter.succeeded()
            return completion
        if status in _BUSY:
            wait = retry_after(response.headers)
            if status == 429 or (status == 503 and wait is not None):
                limiter.throttled(began)
            return Failure(f"status {status}: {said}", wait)
        if status in (400, 422) and self._adapted(said):
            return await self.attempt(client, limiter, talk, tokens)
        return self._refusal(status, said)

    def _refusal(self, status: int, said: str) -> Completion | Failure | TooLarge:
        """What a status means that is no success and no business."""
        if status in (401, 403):
            held = "holds a key that is refused" if os.environ.get(self.key_env) else "is not set"
            raise EndpointRefusedError(f"{self.url} answers {status}: {said}; {self.key_env} {held}")
        if status == 404:
            raise EndpointRefusedError(
                f"{self.url} answers 404: {said}; check model {self.model!r}, and give --base-url with all of its path"
            )
        if status in (400, 413, 422):
            if "content" in said and ("filter" in said or "policy" in said):
                return Completion(said, refused=True)
            if status == 413 or any(each in said.casefold() for each in _TOO_LARGE):
                return TooLarge(f"status {status}: {said}")
        if not self._worked:
            raise EndpointRefusedError(f"{self.url} answers {status}: {said}")
        return Failure(f"status {status}: {said}", final=True)

    def _adapted(self, said: str) -> bool:
        """Send what newer models want instead of what they refuse; whether something was changed."""
        if "max_completion_tokens" in said and self._limit_field == "max_tokens":
            self._limit_field = "max_completion_tokens"
        elif "temperature" in said and self._greedy:
            self._greedy = {}
        elif "logprobs" in said and self._logprobs:
            self._logprobs = {}
        else:
            return False
        return True

    def _masked(self, text: str) -> str:
        key = os.environ.get(self.key_env, "")
        return text.replace(key, "***") if key else text


@functools.cache
def _tls() -> Any:
    """One context for all connections, because to make one takes longer than many a request."""
    return require("httpx2", "arena").create_ssl_context()


def run_tasks(work: Coroutine[Any, Any, None]) -> None:
    """Run what has tasks of its own; the first error of one is raised as it is, and not as a group."""
    try:
        asyncio.run(work)
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
