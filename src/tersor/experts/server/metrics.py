"""What Prometheus reads at /metrics: what waits and runs, where experts are, and what was answered."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tersor._lazy import require
from tersor.experts.server.asking import Facts
from tersor.experts.server.engine import Engine

MINUTE = 60.0
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_CONFIDENCE = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 1)


@dataclass(frozen=True)
class Report:
    """What one engine has to do, and what its experts take.

    Args:
        alive: Whether a batch runs.
        waiting: Requests that wait.
        running: Requests of the batch.
        restarts: Batches that stopped and were started again.
        ended: Answers that have ended, in whatever way.
        base: Bytes of the base's tensors.
        experts: Name, tier, and bytes of each expert's.
    """

    alive: bool
    waiting: int
    running: int
    restarts: int
    ended: int
    base: int
    experts: tuple[tuple[str, str, int], ...]

    @classmethod
    def of(cls, engine: Engine) -> Report:
        """The report of an engine as it is now."""
        held = engine.host.memory_report()
        experts = tuple((name, held.tiers[name], sum(parts.values())) for name, parts in held.experts.items())
        waiting, running = len(engine.waiting.jobs), len(engine.running)
        return cls(engine.alive, waiting, running, engine.restarts, engine.ends, held.base, experts)


class Metrics:
    """Counts of one server.

    Args:
        reports: Asked each time for the reports of the engines behind it, by the values of ``labels``.
        labels: What tells its engines apart; nothing where there is one.
    """

    def __init__(self, reports: Callable[[], Mapping[tuple[str, ...], Report]], labels: tuple[str, ...] = ()) -> None:
        client: Any = require("prometheus_client", "serve")
        self._client, self._reports, self._labels = client, reports, labels
        self._registry = client.CollectorRegistry()
        ours = {"registry": self._registry}
        self._requests = client.Counter("tersor_requests", "Answered requests.", ["expert", "status"], **ours)
        self._tokens = client.Counter("tersor_tokens", "Tokens read and written.", ["expert", "kind"], **ours)
        self._first = client.Histogram("tersor_first_token_seconds", "To the first token.", buckets=_SECONDS, **ours)
        self._whole = client.Histogram("tersor_request_seconds", "To the last one.", buckets=_SECONDS, **ours)
        self._confidence = client.Histogram(
            "tersor_router_confidence", "Probability of the chosen expert.", buckets=_CONFIDENCE, **ours
        )
        self._registry.register(self)
        self._written: deque[tuple[float, int]] = deque()
        self._sure: deque[float] = deque(maxlen=100)

    def answered(self, facts: Facts, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(facts.expert, str(facts.status)).inc()
        self._tokens.labels(facts.expert, "prompt").inc(facts.prompt_tokens)
        self._tokens.labels(facts.expert, "completion").inc(facts.completion_tokens)
        self._written.append((time.monotonic(), facts.completion_tokens))
        self.speed()  # forgets what is long ago
        self._whole.observe(seconds)
        if facts.first_token is not None:
            self._first.observe(facts.first_token)

    def routed(self, probability: float) -> None:
        """Count a decision of the router."""
        self._confidence.observe(probability)
        self._sure.append(probability)

    def speed(self) -> float:
        """Tokens a second of the requests that ended in the last minute."""
        while self._written and self._written[0][0] < time.monotonic() - MINUTE:
            self._written.popleft()
        return sum(tokens for _, tokens in self._written) / MINUTE

    def confidence(self) -> float | None:
        """How sure the router was of the last hundred requests that it read, on average."""
        return sum(self._sure) / len(self._sure) if self._sure else None

    def text(self) -> bytes:
        """All of it, in the format of Prometheus."""
        found: bytes = self._client.generate_latest(self._registry)
        return found

    @property
    def content_type(self) -> str:
        """Of `text`."""
        return str(self._client.CONTENT_TYPE_LATEST)

    def collect(self) -> Iterator[Any]:
        """What is read anew each time; the client calls this."""
        family, labels = require("prometheus_client.core", "serve").GaugeMetricFamily, [*self._labels]
        told = {
            "alive": family("tersor_alive", "Whether a batch runs.", labels=labels),
            "waiting": family("tersor_waiting_requests", "Requests that wait.", labels=labels),
            "running": family("tersor_running_requests", "Requests of the batch.", labels=labels),
            "restarts": family("tersor_batch_restarts", "Batches that stopped and were started again.", labels=labels),
            "ended": family("tersor_ended_answers", "Answers that have ended, in whatever way.", labels=labels),
            "base": family("tersor_base_bytes", "Bytes of the base's tensors.", labels=labels),
        }
        sizes = family("tersor_expert_bytes", "Bytes of an expert's tensors.", labels=[*labels, "expert", "tier"])
        for where, report in self._reports().items():
            for name, each in told.items():
                each.add_metric([*where], getattr(report, name))
            for expert, tier, nbytes in report.experts:
                sizes.add_metric([*where, expert, tier], nbytes)
        yield from (*told.values(), sizes)
