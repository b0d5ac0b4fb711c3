"""Answers in OpenAI's format: whole ones, and the pieces of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tersor.experts.server.sampling import Picked
from tersor.experts.server.text import TextStream, Tongue


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    tongue: Tongue
    stops: Sequence[str]
    logprobs: bool
    prefix: str = ""
    """Text that stands before it: the prompt, where it is to be echoed."""
    tokens: int = 0
    reason: str | None = None
    picked: list[Picked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stream = TextStream(self.tongue, self.stops)

    @property
    def text(self) -> str:
        """All of it."""
        return self.prefix + self.stream.text


@dataclass
class Shape:
    """How the answers to one request look.

    Args:
        chat: Whether they are of a conversation.
        model: Who answered.
    """

    chat: bool
    model: str

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one piece."""
        made = []
        for each in choices:
            logprobs = self._logprobs(each, each.picked, 0) if each.logprobs else None
            message = {"role": "assistant", "content": each.text, "refusal": None}
            said: dict[str, Any] = {"message": message} if self.chat else {"text": each.text}
            made.append({"index": each.index, **said, "logprobs": logprobs, "finish_reason": each.reason})
        return {**self._head("chat.completion"), "choices": made, "usage": usage}

    def piece(self, choice: Choice, text: str | None, picked: Sequence[Picked] = (), *, start: int = 0) -> str:
        """One event of a stream; text None is the one that begins a message or ends an answer."""
        logprobs = self._logprobs(choice, picked, start) if choice.logprobs and picked else None
        if self.chat:
            begins = text is None and choice.reason is None
            delta = {"role": "assistant", "content": ""} if begins else {} if text is None else {"content": text}
            said: dict[str, Any] = {"delta": delta}
        else:
            said = {"text": text or ""}
        made = {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": choice.reason}
        return event({**self._head("chat.completion.chunk"), "choices": [made]})

    def last(self, usage: dict[str, int]) -> str:
        """The event with the usage, where it is asked for."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage})

    def _head(self, chat: str) -> dict[str, Any]:
        kind = chat if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, choice: Choice, picked: Sequence[Picked], start: int) -> dict[str, Any]:
        def shown(token: int) -> str:
            return choice.tongue.decode([token], special=True)

        if not self.chat:
            texts, offsets, at = [shown(each.token) for each in picked], [], start
            for text in texts:
                offsets.append(at)
                at += len(text)
            tops = [{shown(token): value for token, value in each.top} for each in picked]
            found: dict[str, Any] = {"tokens": texts, "token_logprobs": [each.logprob for each in picked]}
            return {**found, "top_logprobs": tops, "text_offset": offsets}

        def row(token: int, logprob: float | None) -> dict[str, Any]:
            return {"token": shown(token), "logprob": logprob, "bytes": list(shown(token).encode())}

        content = [
            {**row(each.token, each.logprob), "top_logprobs": [row(*other) for other in each.top]} for each in picked
        ]
        return {"content": content, "refusal": None}


def usage(prompt: int, answer: int) -> dict[str, int]:
    """What a request took, in tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def event(body: dict[str, Any]) -> str:
    """A body as an event of a stream."""
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"


DONE = "data: [DONE]\n\n"
