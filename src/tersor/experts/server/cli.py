"""`tersor experts serve`."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._lazy import require

if TYPE_CHECKING:
    from tersor.experts.host import ExpertHost
    from tersor.experts.router.routing import Router


def serve(
    bank: Annotated[
        Path, typer.Argument(help="Folder with a delta in each folder, as `tersor experts pack` makes it.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Folder or hub name; by default what the deltas were made of.")
    ] = None,
    router: Annotated[
        str,
        typer.Option(help="Folder of a router for the model 'auto'; 'auto' is BANK/router if it is there, or 'none'."),
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; one that others reach needs --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help="A file with a key a line; requests must bring one of them.")
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device; 'auto' takes a GPU when there is one.")] = "auto",
    batching: Annotated[
        str,
        typer.Option(help="'continuous', 'static', or 'auto': continuous, unless --cache or the library forbids it."),
    ] = "auto",
    cache: Annotated[
        str, typer.Option(help="A compressed KV cache, as of `tersor generate`; needs static batches. 'none' is none.")
    ] = "none",
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of --cache; several times.")] = None,
    places: Annotated[int, typer.Option(help="Requests of a batch at most.")] = 16,
    tokens: Annotated[
        int, typer.Option("--cache-tokens", help="Tokens that the continuous batch's cache holds.")
    ] = 16_384,
    step_tokens: Annotated[int, typer.Option(help="Tokens of one pass of the continuous batch at most.")] = 512,
    max_wait_ms: Annotated[float, typer.Option(help="A static batch waits so long for more requests.")] = 20.0,
    max_experts: Annotated[int, typer.Option(help="Different experts of a batch at most.")] = 4,
    max_resident: Annotated[int | None, typer.Option(help="Experts on the device at most.")] = None,
    max_resident_bytes: Annotated[int | None, typer.Option(help="Their bytes.")] = None,
    max_cpu: Annotated[int | None, typer.Option(help="Experts in host memory at most.")] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more are told to come again.")] = 256,
    max_body: Annotated[int, typer.Option(help="Bytes of a request at most.")] = 4_000_000,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    grace: Annotated[int, typer.Option(help="Seconds that running requests have when the server is stopped.")] = 30,
    lenient: Annotated[bool, typer.Option("--lenient", help="Accept fields that nobody knows.")] = False,
    allow_runtime_updates: Annotated[
        bool, typer.Option("--allow-runtime-updates", help="Let requests load experts of BANK, and unload them.")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Say in the log what was asked.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say where it listens as one JSON object.")] = False,
) -> None:
    """Answer as many experts behind one endpoint that speaks OpenAI's format; a page at / shows them.

    Example: tersor experts serve bank/ --port 8000
    """
    positive = {"--timeout": timeout, "--max-wait-ms": max_wait_ms, "--max-body": max_body, "--places": places}
    for name, value in positive.items():
        if value <= 0:
            raise TersorError(f"{name} {value} must be above 0")
    if batching not in ("auto", "continuous", "static"):
        raise TersorError(f"--batching {batching!r} must be 'auto', 'continuous' or 'static'")
    secrets = _keys(keys)
    require("fastapi", "serve")
    require("prometheus_client", "serve")
    from tersor.kv.settings import recipe_from_text
    from tersor.web.app import address, is_local, known_hosts, listen
    from tersor.web.app import serve as answer

    if not is_local(host) and not secrets:
        raise TersorError(f"--host {host} lets others in: give --keys with a file of keys, one a line")
    recipe = recipe_from_text(cache, settings or [])
    if recipe is not None and batching == "continuous":
        raise TersorError(f"--cache {cache} needs --batching static: continuous batching has a cache of its own")
    chooses = _router(router, bank)
    from tersor.experts.server.app import Server, ServerSettings, api
    from tersor.experts.server.batching import batcher_named
    from tersor.experts.server.engine import Engine, EngineSettings
    from tersor.experts.server.models import Models
    from tersor.experts.server.page import add_page

    engine_settings = EngineSettings(max_queue=max_queue, max_experts=max_experts)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    with listen(host, port) as listening:
        with spinner() as status:
            status.update("loading the base")
            budgets = {"max_resident": max_resident, "max_resident_bytes": max_resident_bytes, "max_cpu": max_cpu}
            served = _host(bank, base, device, **budgets)
            batcher = batcher_named(
                batching, served, places=places, tokens=tokens, step_tokens=step_tokens, wait=max_wait_ms / 1000,
                session=None if recipe is None else lambda: recipe.on(served.model),
            )  # fmt: skip
        with Engine(served, batcher, engine_settings) as engine:
            server = Server(
                Models(served, engine, chooses),
                ServerSettings(
                    keys=secrets, hosts=known_hosts(host), max_body=max_body, seconds=timeout, lenient=lenient,
                    bank=bank if allow_runtime_updates else None, log_prompts=log_prompts,
                ),
            )  # fmt: skip
            app = api(server)
            add_page(app, server)
            how = type(batcher).__name__.removesuffix("Batcher").lower()
            facts = {"address": f"{address(listening)}v1", "models": server.models.names(), "batching": how}
            line = f"{len(served.list_experts())} experts, {how} batches: {facts['address']}"
            typer.echo(json.dumps(facts) if as_json else line, err=not as_json)
            signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
            answer(app, listening, extra="serve", grace=grace)


def _keys(file: Path | None) -> tuple[str, ...]:
    if file is None:
        return ()
    if not file.is_file():
        raise TersorError(f"--keys {file}: no such file")
    found = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not found:
        raise TersorError(f"--keys {file} holds no key")
    return found


def _router(name: str, bank: Path) -> Router | None:
    from tersor.experts.router.routing import Router

    if name == "none" or (name == "auto" and not (bank / "router").is_dir()):
        return None
    return Router.from_pretrained(bank / "router" if name == "auto" else name)


def _host(bank: Path, base: str | None, device: str, **budgets: Any) -> ExpertHost:
    """The base with all experts of a bank."""
    from transformers.utils import logging as library

    from tersor.experts.delta import MANIFEST, read_manifest
    from tersor.experts.host import ExpertHost
    from tersor.experts.sources import load_model
    from tersor.zoo.loading import target_device

    library.disable_progress_bar()
    folders = sorted(each.parent for each in bank.glob(f"*/{MANIFEST}"))
    if not folders:
        raise TersorError(f"{bank} holds no delta: make it with `tersor experts pack --out {bank}`")
    target = target_device(device)
    if base is None:
        named = {read_manifest(folder).base_model_name_or_path for folder in folders}
        if len(named) > 1:
            raise TersorError(f"the deltas of {bank} name several bases {sorted(named)}: say which one with --base")
        base = named.pop()
    served = ExpertHost(load_model(base).to(target).eval(), **budgets)
    for folder in folders:
        served.load_expert(folder.name, folder)
    return served
