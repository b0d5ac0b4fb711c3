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
        self._remembered: OrderedDict[str, Route] = OrderedDict()
        self._lock = threading.Lock()

    def route(self, messages: Messages, *, conversation: str | None = None) -> Route:
        """The expert for a request.

        Args:
            messages: A text, or a conversation of ``{"role": ..., "content": ...}``.
            conversation: What tells conversations apart; by default their first user turn.

        Raises:
            ValueError: If the conversation has no user turn with text.
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
            ValueError: If the folder holds no router, or one that is broken or newer than this version reads.
        """
        config = read_router_config(Path(folder))
        return cls(config, load_scorer(config, Path(folder)))


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
