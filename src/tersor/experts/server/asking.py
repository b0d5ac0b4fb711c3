"""One request from prompt to answer: jobs for the engine, and what their events become."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from tersor.experts.server.answers import DONE, Choice, Shape, event, usage
from tersor.experts.server.engine import BatchStoppedError, Engine, QueueFullError
from tersor.experts.server.errors import ApiError, error_object, refuse
from tersor.experts.server.jobs import Ended, Event, Failure, Job
from tersor.experts.server.models import Speaker
from tersor.experts.server.sampling import Picked, Sampling
from tersor.experts.server.wire import ChatRequest, CompletionRequest

#: Tokens of a completion where neither request nor expert says how many, as OpenAI has it.
COMPLETION_TOKENS = 16


@dataclass
class Facts:
    """What the log and the metrics say of a request."""

    expert: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None
    status: int = 200


class Asking:
    """The answers to one request; use it once.

    Args:
        engine: Writes them.
        speaker: Who answers.
        request: What is asked.
        prompts: Token ids of each prompt, and its text where that is to be echoed.
        seconds: Time that all of it may take.
        facts: Filled in on the way.

    Raises:
        ApiError: If a prompt is empty or too long, or a token is none of the speaker's.
    """

    def __init__(
        self,
        engine: Engine,
        speaker: Speaker,
        request: ChatRequest | CompletionRequest,
        prompts: Sequence[tuple[list[int], str]],
        *,
        seconds: float,
        facts: Facts,
    ) -> None:
        self.engine, self.request, self.facts, self.seconds = engine, request, facts, seconds
        self.began = time.monotonic()
        self.chat = isinstance(request, ChatRequest)
        self.shape = Shape(chat=self.chat, model=speaker.name)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        sampling, count = self._sampling(speaker), request.n or 1
        self.choices: list[Choice] = []
        self.jobs: list[Job] = []
        for ids, text in prompts:
            self._check(speaker, ids)
            for number in range(count):
                own = dict(sampling)
                if own.get("seed") is not None:
                    own["seed"] += number
                self._ask(speaker, ids, text, Sampling(**own))
        self._open = set(range(len(self.jobs)))
        facts.expert, facts.prompt_tokens = speaker.name, sum(len(ids) for ids, _ in prompts)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece.

        Raises:
            ApiError: If it failed.
        """
        async with aclosing(self._pieces()) as pieces:
            async for choice, _, picked in pieces:
                choice.picked += picked
        return self.shape.whole(self.choices, self._usage())

    async def stream(self) -> AsyncGenerator[str]:
        """The answer as events; one that fails after the first one ends with an error object.

        Raises:
            ApiError: If it failed before the first event.
        """
        begun: set[int] = set()
        starts = {choice.index: len(choice.prefix) for choice in self.choices}
        try:
            async with aclosing(self._pieces()) as pieces:
                async for choice, text, picked in pieces:
                    ended, choice.reason = choice.reason, None
                    if choice.index not in begun:
                        begun.add(choice.index)
                        if self.chat or choice.prefix:
                            yield self.shape.piece(choice, None if self.chat else choice.prefix)
                    if text or picked:
                        yield self.shape.piece(choice, text, picked, start=starts[choice.index])
                        starts[choice.index] += len(text)
                    if ended is not None:
                        choice.reason = ended
                        yield self.shape.piece(choice, None)
        except ApiError as error:
            if not begun:
                raise
            self.facts.status = error.failure.status
            yield event(error_object(error.failure))
            return
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield self.shape.last(self._usage())
        yield DONE

    # ---- before -----------------------------------------------------------------------------------------------------

    def _sampling(self, speaker: Speaker) -> dict[str, Any]:
        request = self.request
        found = {**speaker.sampling, **request.sampling()}
        top = request.top_logprobs if isinstance(request, ChatRequest) else request.logprobs
        if isinstance(request, ChatRequest) and request.logprobs and top is None:
            top = 0
        for token in request.sampling()["logit_bias"]:
            if token >= speaker.vocabulary:
                raise refuse(f"logit_bias has token {token}; the model has {speaker.vocabulary}", "logit_bias")
        return {**found, "top_logprobs": top}

    def _check(self, speaker: Speaker, ids: list[int]) -> None:
        name, limit = "messages" if self.chat else "prompt", self.engine.batcher.limit
        if not ids:
            raise refuse(f"{name} has no tokens", name)
        if max(ids) >= speaker.vocabulary:
            raise refuse(f"{name} has token {max(ids)}; the model has {speaker.vocabulary}", name)
        wanted = self._wanted(speaker) or 1
        if len(ids) + wanted > limit:
            raise refuse(
                f"{name} has {len(ids)} tokens and the answer may have {wanted}: together more than the {limit} that "
                "fit; shorten one of them", name, code="context_length_exceeded",
            )  # fmt: skip

    def _wanted(self, speaker: Speaker) -> int | None:
        """Tokens of an answer at most; None is all that fit."""
        request = self.request
        given = request.max_completion_tokens if isinstance(request, ChatRequest) else None
        given = given or request.max_tokens or speaker.max_new_tokens
        return given or (None if self.chat else COMPLETION_TOKENS)

    def _ask(self, speaker: Speaker, ids: list[int], text: str, sampling: Sampling) -> None:
        index = len(self.choices)
        prefix = text if isinstance(self.request, CompletionRequest) and self.request.echo else ""
        logprobs = sampling.top_logprobs is not None
        self.choices.append(Choice(index, speaker.tongue, self.request.stops, logprobs, prefix))

        def tell(what: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, what))

        wanted = self._wanted(speaker) or self.engine.batcher.limit - len(ids)
        self.jobs.append(Job(ids, speaker.expert, sampling, wanted, speaker.ends, tell))

    # ---- during -----------------------------------------------------------------------------------------------------

    async def _pieces(self) -> AsyncGenerator[tuple[Choice, str, list[Picked]]]:
        """Each choice's new text with its tokens; after the last one it has its reason. When it is closed, in whatever
        way, nobody works for it any more.
        """
        try:
            self.engine.submit(self.jobs)
        except QueueFullError as error:
            raise ApiError(Failure(429, "queue_full", str(error))) from None
        except BatchStoppedError as error:
            raise ApiError(Failure(503, "shutting_down", str(error))) from None
        try:
            while self._open:
                choice, piece, picked = self._taken(*await self._next())
                if choice.reason is not None:
                    self._open.remove(choice.index)
                if piece or picked or choice.reason is not None:
                    yield choice, piece, picked
        finally:
            for job in self.jobs:
                if not job.over:
                    self.engine.cancel(job)

    async def _next(self) -> tuple[int, Event]:
        """The next event of a choice that is not complete."""
        while True:
            try:
                index, what = await asyncio.wait_for(self._events.get(), self.began + self.seconds - time.monotonic())
            except TimeoutError:
                message = f"the answer took longer than {self.seconds:g} s; ask for fewer tokens"
                raise ApiError(Failure(504, "timeout", message)) from None
            if index in self._open:  # the batch may not have heard yet that a string stopped it
                return index, what

    def _taken(self, index: int, what: Event) -> tuple[Choice, str, list[Picked]]:
        choice = self.choices[index]
        if isinstance(what, Failure):
            raise ApiError(what)
        if isinstance(what, Ended):
            piece, picked = choice.stream.finish()
            choice.reason = "stop" if choice.stream.stopped else what.reason
            return choice, piece, picked
        choice.tokens += 1
        self.facts.completion_tokens += 1
        if self.facts.first_token is None:
            self.facts.first_token = time.monotonic() - self.began
        piece, picked = choice.stream.push(what)
        if choice.stream.stopped:
            self.engine.cancel(self.jobs[index])
            choice.reason = "stop"
        return choice, piece, picked

    def _usage(self) -> dict[str, int]:
        return usage(self.facts.prompt_tokens, sum(choice.tokens for choice in self.choices))
