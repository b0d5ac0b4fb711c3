"""The wire format of chat completions: what is sent, documented fields alone, and what comes back."""

from __future__ import annotations

import base64
import email.utils
import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tersor._errors import TersorError
from tersor.opening.pictures import Mode, as_jpeg
from tersor.opening.prompts import Message
from tersor.opening.verdicts import thought_only

_END = "/chat/completions"
#: Seconds that a server may ask to wait.
_LONGEST_WAIT = 120.0


class BrokenReplyError(Exception):
    """A reply of status 200 that is none: no JSON, no choices, no content."""


@dataclass(frozen=True)
class Completion:
    """What a model replied.

    Args:
        text: Its answer.
        thought: Whether it thought first, in a field of its own or in tags.
        cut: Whether it ran into the limit of tokens.
        refused: Whether its content was refused.
        tokens_in: Of the prompt.
        tokens_out: Of the reply.
        first_better: Probability that it starts with A rather than with B, where it gives any.
    """

    text: str
    thought: bool = False
    cut: bool = False
    refused: bool = False
    tokens_in: int | None = None
    tokens_out: int | None = None
    first_better: float | None = None


def chat_url(base: str) -> str:
    """The address of chat completions, from a base with or without ``/v1`` or ``/chat/completions``.

    A base without a path gets ``/v1``; a path of the vendor's own stays as it is.
    """
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TersorError(f"--base-url {base!r} must start with http:// or https://")
    if parts.username or parts.password or parts.query:
        raise TersorError("--base-url must hold no key; put the key into an environment variable and name that")
    base = base.rstrip("/")
    if base.endswith(_END):
        return base
    return base + ("" if parts.path.strip("/") else "/v1") + _END


def messages(message: Message, side: int, mode: Mode) -> list[dict[str, Any]]:
    """A message as the wire wants it, pictures as data URLs."""
    parts = [
        {"type": "text", "text": each}
        if isinstance(each, str)
        else {"type": "image_url", "image_url": {"url": _data_url(each, side, mode)}}
        for each in message.parts
    ]
    return [{"role": "system", "content": message.system}, {"role": "user", "content": parts}]


def read_completion(payload: Any) -> Completion:
    """The reply in a body.

    Raises:
        BrokenReplyError: If there is none.
    """
    try:
        choice = payload["choices"][0]
        said = choice["message"]
    except (KeyError, IndexError, TypeError):
        raise BrokenReplyError("no choices") from None
    if not isinstance(said, dict):
        raise BrokenReplyError("no message")
    refusal, usage = said.get("refusal"), payload.get("usage")
    text = _text(said.get("content")) or (refusal if isinstance(refusal, str) else None)
    usage = usage if isinstance(usage, dict) else {}
    thoughts = said.get("reasoning_content") or said.get("reasoning")
    completion = Completion(
        text or "", thought=bool(thoughts) or thought_only(text or "") or "</think>" in (text or ""),
        cut=choice.get("finish_reason") == "length",
        refused=bool(refusal) or choice.get("finish_reason") == "content_filter",
        tokens_in=_count(usage.get("prompt_tokens")), tokens_out=_count(usage.get("completion_tokens")),
        first_better=_first_better(choice.get("logprobs")),
    )  # fmt: skip
    if not completion.text and not completion.refused and not (completion.cut and completion.thought):
        raise BrokenReplyError("no content")
    return completion


def error_text(payload: Any, otherwise: str) -> str:
    """What a body says about an error."""
    error = payload.get("error") if isinstance(payload, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return " ".join(str(error or otherwise).split())[:300]


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that the server asks to wait, given as such or as a date."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now)
        except ValueError:
            return None
    return min(max(0.0, seconds), _LONGEST_WAIT) if math.isfinite(seconds) else None


@functools.lru_cache(maxsize=256)
def _data_url(file: Path, side: int, mode: Mode) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(as_jpeg(file, side, mode)).decode("ascii")


def _text(content: Any) -> str | None:
    """Content that is a text, or a list of parts."""
    if isinstance(content, list):
        parts = [each.get("text") for each in content if isinstance(each, dict) and each.get("type") == "text"]
        return "".join(each for each in parts if isinstance(each, str))
    return content if isinstance(content, str) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _first_better(logprobs: Any) -> float | None:
    """Probability of A against B among the candidates for the first token."""
    try:
        candidates = logprobs["content"][0]["top_logprobs"]
        sides = {"A": 0.0, "B": 0.0}
        for each in candidates:
            if (token := each["token"].strip()) in sides:
                sides[token] += math.exp(each["logprob"])
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError):
        return None
    total = sum(sides.values())
    return sides["A"] / total if total else None
