"""A judge behind an endpoint that speaks OpenAI's chat completions, with what can go wrong there."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

from tersor._errors import TersorError
from tersor.opening.judging.base import Question, Record, Reply
from tersor.opening.judging.client import ChatClient, TooLarge, run_tasks
from tersor.opening.judging.limiter import Limiter
from tersor.opening.judging.wire import Completion, messages
from tersor.opening.prompts import LEAST_SIDE, MOST_PICTURES, REMINDER, JudgePrompt, build
from tersor.opening.records import Label, Status
from tersor.opening.verdicts import parse

#: Failures of one question, after which it is left for the next run.
ATTEMPTS = 6
#: Times that a judge is reminded of what it may say.
RE_ASKS = 2
#: Tokens of a verdict, of a verdict in prose, and of one with thoughts before it.
TOKENS, PROSE_TOKENS, THOUGHT_TOKENS = 16, 256, 4096


class EndpointJudge:
    """Asks an endpoint, several questions at once.

    Args:
        base_url: With or without ``/v1`` or ``/chat/completions``.
        model: Its name there.
        prompt: What it is asked with.
        key_env: Environment variable of the key; without the variable no key is sent.
        concurrency: Open requests at most.
        max_tokens: Of a reply. None starts with 16, and goes up to 4096 for a judge that thinks first.
        logprobs: Ask for the probabilities of first tokens, which decide where both orders say the opposite.
        timeout: Seconds of an attempt.
        backoff: Seconds of the first wait after a failure; it doubles, up to 30 s, and is drawn from 0 to that.
    """

    def __init__(
        self, base_url: str, model: str, prompt: JudgePrompt | None = None, *, key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8, max_tokens: int | None = None, logprobs: bool = False, timeout: float = 120.0,
        backoff: float = 0.5,
    ) -> None:  # fmt: skip
        if not model:
            raise TersorError("judge endpoint: needs a model, such as endpoint:gpt-4o")
        if concurrency < 1 or (max_tokens is not None and max_tokens < 1) or timeout <= 0:
            raise TersorError(
                f"concurrency={concurrency}, max_tokens={max_tokens} and timeout={timeout} must be above 0"
            )
        self.client = ChatClient(base_url, model, key_env=key_env, timeout=timeout, logprobs=logprobs)
        self.url, self.model, self.prompt = self.client.url, model, prompt or JudgePrompt()
        self.concurrency, self.backoff = concurrency, backoff
        self.id = f"endpoint:{model}"
        self.prompt_hash, self.prompt_text = self.prompt.hash, self.prompt.text
        self.settings: dict[str, Any] = {"url": self.url, "max_tokens": max_tokens, "logprobs": logprobs}
        self.fixed_tokens, self.tokens = max_tokens is not None, max_tokens or TOKENS
        self._attempts = ATTEMPTS

    def run(self, questions: Iterator[Question], record: Record) -> None:
        """See `tersor.opening.judging.base.Judge`.

        Raises:
            EndpointRefusedError: If the endpoint refuses all questions: the key, the address or the model is wrong.
        """
        run_tasks(self._run(questions, record))

    def remarks(self) -> list[str]:
        """See `tersor.opening.judging.base.Judge`."""
        thinks = not self.fixed_tokens and self.tokens == THOUGHT_TOKENS
        return [f"it thinks before it answers; replies may have {THOUGHT_TOKENS} tokens"] if thinks else []

    def check(self, question: Question) -> Reply:
        """Ask one question once.

        Raises:
            EndpointRefusedError: As `run`.
            TersorError: If there is no verdict; the message says what came instead.
        """
        self._attempts, found = 1, []

        async def ask() -> None:
            async with self.client.open() as client:
                found.append(await self._ask(client, Limiter(1), question))

        asyncio.run(ask())
        if found[0].label is None:
            raise TersorError(f"{self.url}, model {self.model}: {found[0].status}: {found[0].text[:300] or 'no reply'}")
        return found[0]

    async def _run(self, questions: Iterator[Question], record: Record) -> None:
        limiter = Limiter(self.concurrency)

        async def work() -> None:
            async with self.client.open() as client:
                for question in questions:
                    reply = await self._ask(client, limiter, question)
                    await asyncio.wrap_future(record(question, reply))

        async with asyncio.TaskGroup() as group:
            for _ in range(self.concurrency):
                group.create_task(work())

    async def _ask(self, client: Any, limiter: Limiter, question: Question) -> Reply:
        message = build(self.prompt, question.instance, question.first, question.second)
        side = self.prompt.side if len(message.pictures) <= MOST_PICTURES else LEAST_SIDE
        talk = messages(message, side, self.prompt.mode)
        rng = random.Random(question.battle.id + str(question.order))
        began, sent, failures, re_asks, tokens = time.monotonic(), 0, 0, 0, 0

        def reply(status: Status, text: str, got: Completion | None = None, label: Label | None = None) -> Reply:
            known = {} if got is None else {"tokens_in": got.tokens_in, "tokens_out": got.tokens_out}
            chance = got.first_better if got is not None and label is not None else None
            took = time.monotonic() - began
            return Reply(status, label, chance, text, latency=took, attempts=sent, **known)

        while True:
            sent, asked = sent + 1, max(tokens, self.tokens)
            got = await self.client.attempt(client, limiter, talk, asked)
            if isinstance(got, TooLarge):
                if side <= LEAST_SIDE or not message.pictures:
                    return reply("too_large", got.why)
                side = max(LEAST_SIDE, side // 2)
                talk = messages(message, side, self.prompt.mode)
                continue
            if isinstance(got, Completion):
                if got.refused:
                    return reply("refused", got.text, got)
                if (label := parse(got.text)) is not None:
                    return reply("ok", got.text, got, label)
                tokens = THOUGHT_TOKENS if got.thought else PROSE_TOKENS
                if got.cut and not self.fixed_tokens and tokens > asked:
                    self.tokens = max(self.tokens, tokens if got.thought else 0)  # it will think next time, too
                    continue
                if re_asks == RE_ASKS or not got.text:
                    return reply("unparsed", got.text or "thoughts without an answer", got)
                re_asks += 1
                talk = [*talk, {"role": "assistant", "content": got.text}, {"role": "user", "content": REMINDER}]
                continue
            failures += 1
            if failures >= self._attempts or got.final:
                return reply("error", got.why)
            longest = min(30.0, self.backoff * 2 ** (failures - 1))
            await asyncio.sleep(got.wait if got.wait is not None else rng.uniform(0, longest))
