"""The names that a request may ask for: the base, each expert, and "auto", which a router reads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tersor._errors import TersorError
from tersor.experts.bank import is_name
from tersor.experts.config import UnknownExpertError
from tersor.experts.generation import token_ids
from tersor.experts.host import ExpertHost
from tersor.experts.router.routing import Route, Router
from tersor.experts.server.engine import Engine
from tersor.experts.server.errors import ApiError, refuse
from tersor.experts.server.sampling import own_sampling
from tersor.experts.server.text import Tongue, Tongues

BASE, AUTO = "base", "auto"


@dataclass(frozen=True)
class Speaker:
    """Who answers a request, and how it writes where the request says nothing.

    Args:
        name: As the answer's ``model`` says.
        expert: Its expert; None is the base.
        route: What the router said, None where the request named a model.
        sampling: Fields of `Sampling`.
        ends: Tokens that end its answers.
        max_new_tokens: Tokens of an answer, None where its settings say nothing.
        vocabulary: Number of its tokens.
        tongue: Its tokenizer.
    """

    name: str
    expert: str | None
    route: Route | None
    sampling: Mapping[str, Any]
    ends: frozenset[int]
    max_new_tokens: int | None
    vocabulary: int
    tongue: Tongue


class Models:
    """Finds who answers.

    Args:
        host: The experts.
        engine: Knows whose requests run.
        router: Reads requests for "auto"; None refuses them.

    Raises:
        TersorError: If an expert has a name that means something else, or settings that the server cannot do; or the
            router chooses among experts that are not there.
    """

    def __init__(self, host: ExpertHost, engine: Engine, router: Router | None = None) -> None:
        self.host, self.engine, self.router = host, engine, router
        self.tongues = Tongues(host)
        self.created = int(time.time())
        self.leaving: set[str] = set()
        self._known: dict[tuple[str | None, int], Speaker] = {}
        self._routing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="route")
        self._lock = threading.Lock()
        for name in (None, *host.list_experts()):
            self.check(name)
        if router is not None:
            fallback = [] if router.config.fallback is None else [router.config.fallback]
            if missing := sorted({*router.config.experts, *fallback} - set(host.list_experts())):
                raise TersorError(
                    f"the router chooses {missing[0]!r}, which is not in the bank: pack it, or leave --router"
                )

    def check(self, name: str | None) -> Speaker:
        """See that an expert can be served; raises as the class does."""
        if name in (BASE, AUTO):
            raise TersorError(f"an expert cannot be called {name!r} here: give its folder another name")
        return self._speaker(name, None)

    def names(self) -> list[str]:
        """All that a request may ask for."""
        return [BASE, *self.host.list_experts(), *([AUTO] if self.router else [])]

    def listed(self) -> list[dict[str, Any]]:
        """The models as OpenAI lists them, and where each expert's tensors are."""
        tiers: dict[str, str | None] = {
            BASE: "device",
            **self.host.list_experts(),
            **({AUTO: None} if self.router else {}),
        }
        root = str(getattr(self.host.model, "name_or_path", "") or BASE)
        return [
            {
                "id": name, "object": "model", "created": self.created, "owned_by": "tersor",
                "root": Path(root).name if name == BASE else name,
                "parent": None if name in (BASE, AUTO) else BASE, "status": tier,
            }
            for name, tier in tiers.items()
        ]  # fmt: skip

    async def find(self, model: str, messages: str | Sequence[Mapping[str, Any]] | None) -> Speaker:
        """Who answers a request.

        Args:
            model: As it says.
            messages: What a router reads, None where it is no text.

        Raises:
            ApiError: If there is no such model, or it leaves, or no router.
        """
        route = None
        if model == AUTO:
            route = await self.route(messages)
        name = route.expert if route is not None else None if model == BASE else model
        if name in self.leaving:
            raise refuse(f"expert {name!r} is being unloaded", "model", status=409, code="expert_unloading")
        if (failure := self.engine.refused(name)) is not None:
            raise ApiError(failure)
        try:
            return self._speaker(name, route)
        except UnknownExpertError:
            message = f"the model {name!r} does not exist; known are {', '.join(self.names())}"
            raise refuse(message, "model", status=404, code="model_not_found") from None
        except TersorError as error:
            raise refuse(str(error), "model") from None

    async def route(self, messages: str | Sequence[Mapping[str, Any]] | None) -> Route:
        """What the router says of a request; raises as `find` does."""
        router = self.router
        if router is None:
            raise refuse("the server has no router: name a model, or start it with --router", "model")
        if messages is None:
            raise refuse("the router reads text, and this prompt is made of token ids: name a model", "model")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._routing, lambda: router.route(messages))
        except TersorError as error:
            raise refuse(str(error), "messages") from None

    async def load(self, name: str, folder: Path, *, pin: bool) -> None:
        """Register an expert; raises as `ExpertHost.load_expert` does, and as the class."""

        def work() -> None:
            with self._lock:
                if not is_name(name) or name in (BASE, AUTO):
                    raise TersorError(f"an expert cannot be called {name!r}")
                self.host.load_expert(name, folder, pin=pin)
                try:
                    self.check(name)
                except BaseException:
                    self.host.unload_expert(name)
                    raise

        await asyncio.to_thread(work)

    def _speaker(self, name: str | None, route: Route | None) -> Speaker:
        key = name, 0 if name is None else self.host.generation(name)
        if key not in self._known:
            settings = self.host.settings(name)
            rows = self.host.model.get_input_embeddings().num_embeddings
            self._known[key] = Speaker(
                name=name or BASE, expert=name, route=None, sampling=own_sampling(name or BASE, settings),
                ends=frozenset(token_ids(settings.get("eos_token_id"))), max_new_tokens=settings.get("max_new_tokens"),
                vocabulary=rows if name is None else self.host.vocabulary(name), tongue=self.tongues.of(name),
            )  # fmt: skip
        return replace(self._known[key], route=route)
