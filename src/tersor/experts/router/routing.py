"""Which expert answers a request that names none: a classification of its last user turn (ME-Switch, arXiv 2406.09041).

The paper trains a small language model to name the domain, once a request. What it is prompted with and trained on is
not published; `tersor.experts.router.kinds` has our choice and three cheaper kinds, all behind `Router.route`.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tersor import _atomic
from tersor._errors import TersorError
from tersor.experts.router.config import FORMAT_VERSION, ROUTER_FILE, Messages, RouterConfig, Scorer, read_router_config
from tersor.experts.router.kinds import load_scorer

#: Conversations whose expert is remembered; the one that was silent longest is forgotten first.
REMEMBERED = 10_000
#: Conversations with the same turns so far that are told apart.
SAME = 100


class Route(NamedTuple):
    """Who answers a request, and how likely each expert was."""

    expert: str | None
    """The expert's name; None is the base."""
    prob: float
    """Probability of the likeliest expert, also where the fallback answers."""
    all: dict[str, float]
    """Probability by expert."""


class Router:
    """Chooses an expert for each request; safe to use from several threads.

    router = Router.from_pretrained("router/")
    expert, prob, _ = router.route([{"role": "user", "content": "what is 12 plus 30?"}])
    """

    def __init__(self, config: RouterConfig, scorer: Scorer) -> None:
        self.config, self.scorer = config, scorer
        self._remembered: OrderedDict[str, list[Route]] = OrderedDict()
        self._lock = threading.Lock()

    def route(self, messages: Messages, *, conversation: str | None = None) -> Route:
        """The expert for a request.

        Args:
            messages: A text, or a conversation of ``{"role": ..., "content": ...}``.
            conversation: An id that tells conversations apart. Without one a request goes on with the conversation
                whose last request was this one's history, every turn of it; where none was, it begins one.

        Raises:
            ValueError: If the conversation has no user turn with text.
        """
        turns = user_turns(messages)
        if not self.config.sticky:
            return self.route_all([turns[-1]])[0]
        if conversation is None:
            return self._go_on(messages, turns[-1])
        key = _key("id", conversation)
        with self._lock:
            if (known := self._remembered.get(key)) is not None:
                self._remembered.move_to_end(key)
                return known[0]
        found = self.route_all([turns[-1]])[0]
        with self._lock:
            found = self._remembered.setdefault(key, [found])[0]  # of two first requests at once, one decides
            self._forget_old()
        return found

    def _go_on(self, messages: Messages, last: str) -> Route:
        """The route of a request without an id.

        Of conversations whose turns are the same so far each is remembered by itself, and the request that goes on with
        one takes it: two that begin with the same words do not stay together.
        """
        before, now = _histories(messages)
        with self._lock:
            again = self._remembered.get(now) if before else None
            known = self._remembered.get(before, []) if before else []
            found = again[0] if again else known.pop(0) if known else None  # the same request again is no other one
            if before and not known:
                self._remembered.pop(before, None)
        if found is None:
            found = self.route_all([last])[0]
        with self._lock:
            same = self._remembered.setdefault(now, [])
            if len(same) < SAME:
                same.append(found)
            self._remembered.move_to_end(now)
            self._forget_old()
        return found

    def _forget_old(self) -> None:
        if len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)

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
            self._remembered.pop(_key("id", conversation), None)

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
            ValueError: If the folder holds no router, or one that is broken or newer than this version reads.
        """
        config = read_router_config(Path(folder))
        return cls(config, load_scorer(config, Path(folder)))


def _key(kind: str, value: Any) -> str:
    return hashlib.sha256(json.dumps([kind, value], sort_keys=True, default=repr).encode()).hexdigest()


def _histories(messages: Messages) -> tuple[str | None, str]:
    """Keys of a conversation as the request before this one had it, None where this is the first, and as it is now."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    asked = [place for place, turn in enumerate(turns) if turn.get("role") == "user"]
    turns = turns[: asked[-1] + 1]
    # A client may send several turns at once: the request before ended before the last answer.
    answers = [place for place, turn in enumerate(turns) if turn.get("role") == "assistant"]
    before = [place for place in asked if answers and place < answers[-1]]
    return _key("history", turns[: before[-1] + 1]) if before else None, _key("history", turns)


def user_turns(messages: Messages) -> list[str]:
    """Texts of the user's turns, in order; raises `ValueError` where there are none."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    turns = [_text(turn["content"]) for turn in messages if turn.get("role") == "user" and turn.get("content")]
    turns = [turn for turn in turns if turn.strip()]
    if not turns:
        raise TersorError("there is no user turn with text to route on")
    return turns


def _text(content: Any) -> str:
    """A turn's text, whether it is one or made of parts as in the OpenAI format."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
