"""What a server is made of, by the names of its command line, and the engine that comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._errors import TersorError
from tersor.kv.settings import recipe_from_text

if TYPE_CHECKING:
    from tersor.experts.host import ExpertHost
    from tersor.experts.router.routing import Router
    from tersor.experts.server.endpoint import ServerSettings
    from tersor.experts.server.models import Models


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of `tersor experts serve`, each with its name there; its help says what they mean.

    Raises:
        TersorError: If one is out of its range, or two exclude each other.
    """

    bank: Path
    base: str | None = None
    router: str = "auto"
    keys: Path | None = None
    device: str = "auto"
    batching: str = "auto"
    cache: str = "none"
    set: tuple[str, ...] = ()
    places: int = 16
    cache_tokens: int = 16_384
    step_tokens: int = 512
    max_wait_ms: float = 20.0
    max_experts: int = 4
    max_resident: int | None = None
    max_resident_bytes: int | None = None
    max_cpu: int | None = None
    max_queue: int = 256
    max_body: int = 4_000_000
    timeout: float = 600.0
    grace: int = 30
    lenient: bool = False
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("timeout", "max_wait_ms", "max_body", "places"):
            if (value := getattr(self, name)) <= 0:
                raise TersorError(f"--{name.replace('_', '-')} {value} must be above 0")
        if self.batching not in ("auto", "continuous", "static"):
            raise TersorError(f"--batching {self.batching!r} must be 'auto', 'continuous' or 'static'")
        if recipe_from_text(self.cache, list(self.set)) is not None and self.batching == "continuous":
            raise TersorError(
                f"--cache {self.cache} needs --batching static: continuous batching has a cache of its own"
            )

    def secrets(self) -> tuple[str, ...]:
        """The keys of the file of keys; none without one.

        Raises:
            TersorError: If it is missing or empty.
        """
        if self.keys is None:
            return ()
        if not self.keys.is_file():
            raise TersorError(f"--keys {self.keys}: no such file")
        found = tuple(line.strip() for line in self.keys.read_text(encoding="utf-8").splitlines() if line.strip())
        if not found:
            raise TersorError(f"--keys {self.keys} holds no key")
        return found

    def settings(self, **more: Any) -> ServerSettings:
        """What is let in; ``more`` is what these options do not say."""
        from tersor.experts.server.endpoint import ServerSettings

        return ServerSettings(
            keys=self.secrets(), max_body=self.max_body, seconds=self.timeout, lenient=self.lenient,
            log_prompts=self.log_prompts, **more,
        )  # fmt: skip

    def chooser(self) -> Router | None:
        """The router for the model "auto", None where there is none."""
        from tersor.experts.router.routing import Router

        if self.router == "none" or (self.router == "auto" and not (self.bank / "router").is_dir()):
            return None
        return Router.from_pretrained(self.bank / "router" if self.router == "auto" else self.router)

    def folders(self) -> list[Path]:
        """The deltas of the bank; their names are the experts'.

        Raises:
            TersorError: If there is none.
        """
        from tersor.experts.delta import MANIFEST

        found = sorted(each.parent for each in self.bank.glob(f"*/{MANIFEST}"))
        if not found:
            raise TersorError(f"{self.bank} holds no delta: make it with `tersor experts pack --out {self.bank}`")
        return found

    def host(self) -> ExpertHost:
        """The base with all experts of the bank."""
        from transformers.utils import logging as library

        from tersor.experts.delta import read_manifest
        from tersor.experts.host import ExpertHost
        from tersor.experts.sources import load_model
        from tersor.zoo.loading import target_device

        library.disable_progress_bar()
        folders, base = self.folders(), self.base
        target = target_device(self.device)
        if base is None:
            named = {read_manifest(folder).base_model_name_or_path for folder in folders}
            if len(named) > 1:
                raise TersorError(
                    f"the deltas of {self.bank} name several bases {sorted(named)}: say which one with --base"
                )
            base = named.pop()
        served = ExpertHost(
            load_model(base).to(target).eval(), max_resident=self.max_resident,
            max_resident_bytes=self.max_resident_bytes, max_cpu=self.max_cpu,
        )  # fmt: skip
        for folder in folders:
            served.load_expert(folder.name, folder)
        return served


@contextmanager
def running(options: ServeOptions) -> Iterator[Models]:
    """The models of these options, answered by an engine that runs inside the block."""
    from tersor.experts.server.batching import batcher_named
    from tersor.experts.server.engine import Engine, EngineSettings
    from tersor.experts.server.models import Models

    chooses = options.chooser()
    settings = EngineSettings(max_queue=options.max_queue, max_experts=options.max_experts)
    recipe, host = recipe_from_text(options.cache, list(options.set)), options.host()
    if recipe is not None:
        recipe.cache(host.model.config)  # refuses a model that it cannot compress before anybody asks
    batcher = batcher_named(
        options.batching, host, places=options.places, tokens=options.cache_tokens, step_tokens=options.step_tokens,
        wait=options.max_wait_ms / 1000, session=None if recipe is None else lambda: recipe.on(host.model),
    )  # fmt: skip
    with Engine(host, batcher, settings) as engine:
        yield Models(host, engine, chooses)
