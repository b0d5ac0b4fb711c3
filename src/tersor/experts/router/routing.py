"""Which expert answers a request that names none: a classification of its last user turn (ME-Switch, arXiv 2406.09041).

The paper trains a small language model to name the domain, once a request. What it is prompted with and trained on is
not published; `router_kinds` has our choice and three cheaper kinds, all behind `Router.route`.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from tersor import _atomic
from tersor.experts.bank import is_name

ROUTER_FILE = "router.json"
FORMAT_VERSION = 1
KINDS = ("llm", "encoder", "embedding", "rules")
#: Conversations whose expert is remembered; the one that was silent longest is forgotten first.
REMEMBERED = 10_000

Messages = str | Sequence[Mapping[str, Any]]


class Route(NamedTuple):
    """``expert``: who answers, None is the base. ``prob``: of the likeliest expert, also where the fallback answers.
    ``all``: probability by expert.
    """

    expert: str | None
    prob: float
    all: dict[str, float]


class Scorer(Protocol):
    """What a kind of router has to know."""

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """Float32 ``[len(texts), experts]``, rows that add up to one, in the order of the router's experts."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What ``router.json`` says.

    Raises:
        ValueError: for a setting out of range.
    """

    kind: str
    """One of `KINDS`."""
    experts: Mapping[str, str]
    """What each expert is for, in one line, by name; at least two."""
    threshold: float = 0.0
    """A request whose likeliest expert is less likely than this goes to ``fallback``."""
    fallback: str | None = None
    """An expert's name, or None for the base."""
    sticky: bool = True
    """Whether a conversation stays with the expert of its first request."""
    max_tokens: int = 512
    """Tokens that the router reads; of longer requests the end."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"router kind {self.kind!r} is not possible; choose one of {KINDS}")
        if len(self.experts) < 2:
            raise ValueError(f"a router chooses among at least two experts, got {list(self.experts)}")
        for name, what in self.experts.items():
            if not is_name(name) or not isinstance(what, str) or not what.strip() or "\n" in what:
                raise ValueError(f"expert {name!r} needs a plain name and a description of one line, got {what!r}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r} must be a probability from 0 to 1")
        if self.fallback is not None and not is_name(self.fallback):
            raise ValueError(f"fallback={self.fallback!r} is no name of an expert")
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 8:
            raise ValueError(f"max_tokens={self.max_tokens!r} must be an integer of at least 8")


class Router:
    """Chooses an expert for each request; safe to use from several threads.

    router = Router.from_pretrained("router/")
    expert, prob, _ = router.route([{"role": "user", "content": "what is 12 plus 30?"}])
    """

    def __init__(self, config: RouterConfig, scorer: Scorer) -> None:
        self.config, self.scorer = config, scorer
        self._remembered: OrderedDict[str, Route] = OrderedDict()
        self._lock = threading.Lock()

    def route(self, messages: Messages, *, conversation: str | None = None) -> Route:
        """The expert for a request: a text, or a conversation of ``{"role": ..., "content": ...}``.

        Args:
            conversation: what tells conversations apart; by default their first user turn.

        Raises:
            ValueError: for a conversation without a user turn that has text.
        """
        turns = user_turns(messages)
        if not self.config.sticky:
            return self.route_all([turns[-1]])[0]
        key = hashlib.sha256((conversation or f"\n{turns[0]}").encode()).hexdigest()
        with self._lock:
            if (known := self._remembered.get(key)) is not None:
                self._remembered.move_to_end(key)
                return known
        found = self.route_all([turns[-1]])[0]
        with self._lock:
            found = self._remembered.setdefault(key, found)  # of two first requests at once, one decides
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return found

    def route_all(self, texts: Sequence[str]) -> list[Route]:
        """Routes of single requests, computed together; nothing is remembered."""
        names = list(self.config.experts)
        routes = []
        for row in self.scorer.probabilities(texts).tolist():
            best = max(range(len(names)), key=row.__getitem__)
            sure = row[best] >= self.config.threshold
            routes.append(
                Route(names[best] if sure else self.config.fallback, row[best], dict(zip(names, row, strict=True)))
            )
        return routes

    def forget(self, conversation: str) -> None:
        """Route the next request of a conversation anew."""
        with self._lock:
            self._remembered.pop(hashlib.sha256(conversation.encode()).hexdigest(), None)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `from_pretrained` reads; ``router.json`` comes last and makes it valid."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / ROUTER_FILE).unlink(missing_ok=True)
        kept: Any = self.scorer  # all of `KINDS` write their files; what routers are compared with does not
        kept.save(target)
        values = {**vars(self.config), "experts": dict(self.config.experts), "format_version": FORMAT_VERSION}
        _atomic.write_text(target / ROUTER_FILE, json.dumps(values, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Router:
        """Read a folder.

        Raises:
            ValueError: for a folder that holds no router, or one that is broken or newer than this version reads.
        """
        from tersor.experts.router.kinds import load_scorer

        config = read_router_config(Path(folder))
        return cls(config, load_scorer(config, Path(folder)))


def read_router_config(folder: Path) -> RouterConfig:
    """What a router's folder says of itself; raises as `Router.from_pretrained` does."""
    file = folder / ROUTER_FILE
    if not file.is_file():
        raise ValueError(f"{folder}: no {ROUTER_FILE}; give the folder that `tersor experts router train` wrote")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = values.pop("format_version")
        if version == FORMAT_VERSION:
            return RouterConfig(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} describes no router: {error}") from None
    raise ValueError(f"{file} has format {version!r}, this tersor reads {FORMAT_VERSION}: upgrade it")


def user_turns(messages: Messages) -> list[str]:
    """Texts of the user's turns, in order; raises `ValueError` where there are none."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    turns = [_text(turn["content"]) for turn in messages if turn.get("role") == "user" and turn.get("content")]
    turns = [turn for turn in turns if turn.strip()]
    if not turns:
        raise ValueError("there is no user turn with text to route on")
    return turns


def _text(content: Any) -> str:
    """A turn's text, whether it is one or made of parts as in the OpenAI format."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
