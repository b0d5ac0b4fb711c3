"""The server on Ray Serve: an ingress, and replicas that each hold the base once and the experts that are asked for.

`application` is what a config file of Serve names; `tersor experts serve --cluster` runs the same on this machine, or
on the Ray cluster that it finds.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from tersor._errors import TersorError
from tersor._lazy import require
from tersor.experts.server.app import api
from tersor.experts.server.cluster_ingress import Cluster
from tersor.experts.server.cluster_replica import Part, Replica
from tersor.experts.server.models import BASE
from tersor.experts.server.options import ServeOptions
from tersor.experts.server.wire import ChatRequest, CompletionRequest
from tersor.web.app import known_hosts, listen

NAME = "tersor"


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(ServeOptions):
    """Options of a cluster, beside those of a server.

    Args:
        replicas: How many there are; one by default.
        autoscaling: Fields of Serve's ``AutoscalingConfig``, instead of a fixed number.

    Raises:
        TersorError: As `ServeOptions`; if both are given, or Serve knows no such field or value.
    """

    replicas: int | None = None
    autoscaling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replicas is not None and self.replicas < 1:
            raise TersorError(f"--replicas {self.replicas} must be at least 1")
        if self.replicas is not None and self.autoscaling:
            raise TersorError("--replicas and --autoscaling exclude each other: give min_replicas and max_replicas")
        self.scale()
        if self.router not in ("auto", "none") and not os.path.isfile(os.path.join(self.router, "router.json")):
            raise TersorError(f"--router {self.router}: no router.json there")

    def scale(self) -> dict[str, Any]:
        """How many replicas there are, as Serve's ``deployment`` takes it."""
        if not self.autoscaling:
            return {"num_replicas": self.replicas or 1}
        kind = require("ray.serve.config", "cluster").AutoscalingConfig
        if unknown := sorted(set(self.autoscaling) - set(kind.model_fields)):
            raise TersorError(f"--autoscaling {unknown[0]} is no field of Serve's AutoscalingConfig")
        return {"autoscaling_config": _checked(kind, self.autoscaling, "--autoscaling")}


def application(args: dict[str, Any]) -> Any:
    """The application for a config file of Serve.

    Args:
        args: Options by their names on the command line, with "_" for "-"; see `ClusterOptions`.

    Raises:
        TersorError: If one is unknown, or of another type.
    """
    if unknown := sorted(set(args) - {each.name for each in fields(ClusterOptions)}):
        raise TersorError(f"the config file's args have {unknown[0]!r}, which is no option of a cluster")
    return build(_checked(ClusterOptions, args, "the config file's args"))


def build(options: ClusterOptions, *, hosts: list[str] | None = None, gpus: float | None = None) -> Any:
    """The application of Serve.

    Args:
        options: Of the cluster.
        hosts: See `tersor.web.app.create_app`.
        gpus: GPUs of a replica; by default one where the device is CUDA's.
    """
    serve: Any = require("ray.serve", "cluster")
    options.folders()
    options.secrets()
    gpus = float(options.device.startswith("cuda")) if gpus is None else gpus

    class Experts(Replica):
        """A replica whose experts Serve knows of, so that it sends a request where its expert is."""

        @serve.multiplexed(max_num_models_per_replica=options.max_resident or -1)  # type: ignore[untyped-decorator]
        async def remembered(self, name: str) -> str:
            """Serve counts the names; what is on the device is for the bank to say, which knows bytes."""
            return name

        async def answer(self, asked: ChatRequest | CompletionRequest) -> AsyncGenerator[Part]:
            """See `Replica`."""
            if asked.model != BASE:
                await self.remembered(asked.model)
            async for part in super().answer(asked):
                yield part

    class Ingress:
        """What Serve's proxies send requests to."""

        def __init__(self, replicas: Any, options: ClusterOptions, hosts: list[str] | None) -> None:
            logging.basicConfig(level=logging.INFO, format="%(message)s")
            self._endpoint = Cluster(replicas, options.settings(hosts=hosts))

        def __serve_build_asgi_app__(self) -> Any:
            """As Serve wants it: the app is made where it runs."""
            return api(self._endpoint)

    ending = {"graceful_shutdown_timeout_s": options.grace}
    # A replica takes as many requests as its batch has places, so that more of them go to another one, even where
    # they all want one expert; those beyond wait in the ingress.
    replicas = serve.deployment(
        Experts, name="Experts", max_ongoing_requests=options.places, max_queued_requests=options.max_queue,
        health_check_period_s=5, ray_actor_options={"num_cpus": 1, "num_gpus": gpus}, **ending, **options.scale(),
    )  # fmt: skip
    ingress = serve.deployment(
        serve.ingress()(Ingress), name="Ingress", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0},
        **ending,
    )  # fmt: skip
    return ingress.bind(replicas.bind(options), options, hosts)


def start(options: ClusterOptions, host: str, port: int) -> str:
    """Run the application on the Ray cluster that is here, or on one of this machine; returns its address.

    Args:
        options: Of the cluster.
        host: See `listen`.
        port: See `listen`.

    Raises:
        TersorError: If the port is taken, or Serve runs there already and listens elsewhere.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray, serve = require("ray", "cluster"), require("ray.serve", "cluster")
    options.folders()
    with listen(host, port) as listening:
        port = listening.getsockname()[1]
    ray.init(ignore_reinit_error=True, include_dashboard=False, logging_level=logging.ERROR)
    gpus = float(options.device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
    serve.start(http_options={"host": host, "port": port})
    made = build(options, hosts=known_hosts(host), gpus=gpus or None)
    serve.run(made, name=NAME, route_prefix="/")
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError:
        raise TersorError(
            f"--port {port}: Serve runs on this Ray cluster already, with an address of its own; deploy a config file, "
            "or end it with `serve shutdown`"
        ) from None
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def stop() -> None:
    """End what `start` began; other applications of the Ray cluster stay."""
    ray, serve = require("ray", "cluster"), require("ray.serve", "cluster")
    if ray.is_initialized():  # Serve would start it otherwise
        with suppress(require("ray.serve.exceptions", "cluster").RayServeException):  # Serve was not started
            serve.delete(NAME)
            if not serve.status().applications:
                serve.shutdown()
        ray.shutdown()


def run(options: ClusterOptions, host: str, port: int, tell: Callable[[str], None], *, as_json: bool) -> None:
    """`start`, say where, and `stop` when the process is interrupted or told to end.

    Args:
        options: Of the cluster.
        host: See `listen`.
        port: See `listen`.
        tell: Called with the line.
        as_json: Whether the line is JSON.
    """
    try:
        at = f"{start(options, host, port)}v1"
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        facts = {"address": at, "experts": [each.name for each in options.folders()], "scale": options.scale()}
        line = f"{len(facts['experts'])} experts on Ray Serve: {at}"
        tell(json.dumps(facts, default=str) if as_json else line)
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)
    finally:
        stop()


def _checked(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    """An instance of a class with typed fields; what does not fit is refused in one line."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        named = ".".join(map(str, first["loc"]))
        raise TersorError(f"{where}{' ' + named if named else ''}: {first['msg']}".replace("\n", " ")) from None
