"""`tersor experts serve`."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._lazy import require

if TYPE_CHECKING:
    from tersor.experts.server.options import ServeOptions


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
        str,
        typer.Option(
            help="A compressed KV cache or a plan, as of `tersor generate`; needs static batches. 'none' is none."
        ),
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
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Answer on Ray Serve: on the Ray cluster that is here, or one of its own.")
    ] = False,
    replicas: Annotated[int | None, typer.Option(help="Of --cluster; each holds the base. 1 by default.")] = None,
    autoscaling: Annotated[
        list[str] | None,
        typer.Option(help="A field of Serve's AutoscalingConfig, such as max_replicas=4; several times."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say where it listens as one JSON object.")] = False,
) -> None:
    """Answer as many experts behind one endpoint that speaks OpenAI's format; a page at / shows them.

    Example: tersor experts serve bank/ --port 8000
    """
    if not cluster and (replicas is not None or autoscaling):
        raise TersorError("--replicas and --autoscaling need --cluster")
    if cluster and allow_runtime_updates:
        raise TersorError("--allow-runtime-updates is for one machine: with --cluster change BANK, and start it again")
    from tersor.experts.server.options import ServeOptions

    given: dict[str, Any] = {
        "bank": bank, "base": base, "router": router, "keys": keys, "device": device, "batching": batching,
        "cache": cache, "set": tuple(settings or ()), "places": places, "cache_tokens": tokens,
        "step_tokens": step_tokens, "max_wait_ms": max_wait_ms, "max_experts": max_experts,
        "max_resident": max_resident, "max_resident_bytes": max_resident_bytes, "max_cpu": max_cpu,
        "max_queue": max_queue, "max_body": max_body, "timeout": timeout, "grace": grace, "lenient": lenient,
        "log_prompts": log_prompts,
    }  # fmt: skip
    options = ServeOptions(**given)
    secrets = options.secrets()
    require("fastapi", "serve")
    require("prometheus_client", "serve")
    from tersor.web.app import is_local

    if not is_local(host) and not secrets:
        raise TersorError(f"--host {host} lets others in: give --keys with a file of keys, one a line")
    tell = partial(typer.echo, err=not as_json)
    if cluster:
        require("ray.serve", "cluster")
        from tersor.experts.server.cluster import ClusterOptions, run

        found = {name: _anywhere(given[name]) for name in ("bank", "base", "keys")}
        scale = dict(_pair(each) for each in autoscaling or ())
        if router not in ("auto", "none"):
            found["router"] = _anywhere(router)
        made = ClusterOptions(**{**given, **found}, replicas=replicas, autoscaling=scale)
        run(made, host, port, tell, as_json=as_json)
    else:
        _serve(options, host, port, tell, updates=allow_runtime_updates, as_json=as_json)


def _serve(
    options: ServeOptions, host: str, port: int, tell: Callable[[str], None], *, updates: bool, as_json: bool
) -> None:
    """The server of one machine."""
    from tersor.experts.server.app import Server, api
    from tersor.experts.server.options import running
    from tersor.experts.server.page import add_page
    from tersor.web.app import address, known_hosts, listen
    from tersor.web.app import serve as answer

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    with listen(host, port) as listening, ExitStack() as open_:
        with spinner() as status:
            status.update("loading the base")
            models = open_.enter_context(running(options))
        bank = options.bank if updates else None
        server = Server(models, options.settings(hosts=known_hosts(host), bank=bank))
        app = api(server)
        add_page(app, server)
        how = type(server.engine.batcher).__name__.removesuffix("Batcher").lower()
        facts = {"address": f"{address(listening)}v1", "models": models.names(), "batching": how}
        line = f"{len(models.host.list_experts())} experts, {how} batches: {facts['address']}"
        tell(json.dumps(facts) if as_json else line)
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        answer(app, listening, extra="serve", grace=options.grace)


def _anywhere(place: Any) -> Any:
    """A path as it is called in every folder; replicas run in others. What is no path here stays as it is."""
    return type(place)(Path(place).resolve()) if place is not None and Path(place).exists() else place


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise TersorError(f"--autoscaling {text!r} must be NAME=VALUE")
    return name, value
