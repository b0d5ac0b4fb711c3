"""One answer in the making: what is asked, what came so far, and how it ends."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tersor.experts.server.sampling import Picked, Sampler, Sampling

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer, as the client is told.

    Args:
        status: Of HTTP.
        code: A word for programs.
        message: A sentence for people, with what to do.
        param: The field of the request that it is about.
    """

    status: int
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Ended:
    """An answer is complete: ``reason`` is "stop" after a token that ends it, "length" where it may not go on."""

    reason: str


Event = Picked | Ended | Failure


@dataclass(eq=False)
class Job:
    """One answer, which a batch writes token by token.

    Args:
        prompt: Token ids, at least one.
        expert: Who answers; None is the base.
        sampling: How tokens are drawn.
        max_new_tokens: Tokens of the answer at most.
        ends: Tokens that end it.
        tell: Called with each event, from the batch's thread; the last one is `Ended` or `Failure`.
    """

    prompt: Sequence[int]
    expert: str | None
    sampling: Sampling
    max_new_tokens: int
    ends: frozenset[int]
    tell: Callable[[Event], None]
    id: str = field(default_factory=lambda: f"job-{next(_NUMBERS)}")
    came: float = field(default_factory=time.monotonic)
    written: int = 0
    over: bool = False

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.sampling, self.prompt)

    def pick(self, logits: Tensor) -> int:
        """Draw the next token from logits ``[vocabulary]`` and tell it; returns its id."""
        picked = self.sampler.pick(logits)
        self.written += 1
        if not self.over:
            self.tell(picked)
            if picked.token in self.ends:
                self.finish(Ended("stop"))
            elif self.written >= self.max_new_tokens:
                self.finish(Ended("length"))
        return picked.token

    def finish(self, event: Ended | Failure) -> None:
        """Tell the last event, once; nothing is told after it."""
        if not self.over:
            self.over = True
            self.tell(event)
