"""A cluster of two replicas on this machine: what it adds to the time of an answer, and what a lost replica costs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tersor import zoo
from tersor._lazy import require
from tersor.bench.measure import PairedTimes, time_paired
from tersor.experts.bench.skills import SKILLS
from tersor.experts.bench.soak import MODEL, expected_answers, packed, serving
from tersor.experts.router.routing import Router
from tersor.experts.server.app import Server
from tersor.experts.server.batching import ContinuousBatcher
from tersor.experts.server.cluster import ClusterOptions, start, stop
from tersor.experts.server.endpoint import ServerSettings
from tersor.experts.server.engine import Engine
from tersor.experts.server.models import Models

ONE, CLUSTER = "one machine", "cluster"
REPLICAS, PLACES, TOKENS, PATIENCE = 2, 8, 12, 120.0
#: Experts of which a replica has room for the bytes, while Serve counts all four.
ROOM = 2
#: Model and prompt -> the answer.
Answers = dict[tuple[str, str], str]


@dataclass
class Seen:
    """What clients saw.

    Args:
        statuses: Of all answers.
        right: Answers as `generate` gives them.
        wrong: Others that looked whole.
        ended: Streams that ended with an error object.
        longest: Seconds of the longest answer.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    right: int = 0
    wrong: int = 0
    ended: int = 0
    longest: float = 0.0


@contextmanager
def cluster(seed: int) -> Iterator[tuple[str, str, Answers]]:
    """The addresses of a server of one machine and of a cluster with the same experts, and what is right."""
    router = Router.from_pretrained(zoo.path(MODEL) / "router")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_:
        bank = Path(folder)
        host, bad = packed(bank)
        shutil.rmtree(bad)
        for part in zoo.load(MODEL):  # in float32, as here: the stored numbers are of 16 bits, whose answers differ
            part.save_pretrained(bank / "base")
        expected, _ = expected_answers(host, router, seed)
        room = 0
        for name in SKILLS:
            room = max(room, host.hold(name).delta.nbytes)
            host.release(name)
        engine = open_.enter_context(Engine(host, ContinuousBatcher(host, places=PLACES)))
        one = open_.enter_context(serving(Server(Models(host, engine), ServerSettings())))
        open_.callback(stop)
        at = start(
            ClusterOptions(
                bank=bank, base=str(bank / "base"), router="none", replicas=REPLICAS, places=PLACES,
                max_resident_bytes=ROOM * room, batching="continuous",
            ), "127.0.0.1", 0,
        )  # fmt: skip
        yield one, at, {key: text for key, text in expected.items() if key[0] in SKILLS}


def ask(
    at: str, model: str, prompt: str, *, tokens: int = TOKENS, stream: bool = False, client: Any = None
) -> tuple[int, str | None]:
    """Ask once; returns the status and the text, which is None where a stream ended with an error object.

    Args:
        at: Address of the server.
        model: Who answers.
        prompt: What is asked.
        tokens: Of the answer at most.
        stream: Whether it comes as a stream.
        client: Whose connection is used; one of its own by default.
    """
    client = client or require("httpx2", "arena")
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": stream}
    answer = client.post(f"{at}v1/completions", json=body, timeout=PATIENCE)
    if answer.status_code != 200 or not stream:
        return answer.status_code, answer.json()["choices"][0]["text"] if answer.status_code == 200 else None
    *events, last = [each.removeprefix("data: ") for each in answer.text.split("\n\n") if each]
    if last != "[DONE]":
        assert json.loads(last)["error"]["code"]
        return 200, None
    return 200, "".join(choice["text"] for each in events for choice in json.loads(each)["choices"])


def load(at: str, asked: Sequence[tuple[str, str]], expected: Answers, *, together: int) -> Seen:
    """Have prompts answered, some at once, every other one as a stream."""
    seen, lock = Seen(), threading.Lock()

    def one(number: int) -> None:
        began = time.monotonic()
        status, text = ask(at, *asked[number], stream=number % 2 == 1)
        with lock:
            seen.statuses[status] += 1
            seen.right += text == expected[asked[number]]
            seen.wrong += text is not None and text != expected[asked[number]]
            seen.ended += status == 200 and text is None
            seen.longest = max(seen.longest, time.monotonic() - began)

    with ThreadPoolExecutor(together) as pool:
        list(pool.map(one, range(len(asked))))
    return seen


def replicas(at: str, quantity: str = "tersor_alive") -> dict[str, list[tuple[str, float]]]:
    """The lines of a quantity in the metrics of a cluster, by replica: its labels and values."""
    httpx: Any = require("httpx2", "arena")
    found: dict[str, list[tuple[str, float]]] = {}
    for line in httpx.get(f"{at}metrics", timeout=PATIENCE).text.splitlines():
        if (match := re.match(rf'{quantity}{{(.*replica="([^"]*)".*)}} (\S+)', line)) is not None:
            found.setdefault(match[2], []).append((match[1], float(match[3])))
    return found


def time_latency(one: str, at: str, expected: Answers, *, tokens: int, repeats: int, requests: int = 8) -> PairedTimes:
    """Time requests one after the other, at a server of one machine and at a cluster, in turns; seconds a request."""
    httpx: Any = require("httpx2", "arena")
    model, prompt = next(iter(expected))
    with httpx.Client() as client:

        def work(where: str) -> Callable[[], None]:
            def several() -> None:
                for _ in range(requests):
                    ask(where, model, prompt, tokens=tokens, client=client)

            return several

        times = time_paired({ONE: work(one), CLUSTER: work(at)}, repeats=repeats, warmup=2)
    return PairedTimes({name: tuple(each / requests for each in found) for name, found in times.samples.items()})


def resident(at: str) -> int:
    """Experts on the device of the replica that has the most."""
    held = replicas(at, "tersor_expert_bytes").values()
    return max(sum('tier="device"' in labels for labels, _ in each) for each in held)


def kill_one(at: str, expected: Answers, *, requests: int, together: int) -> Seen:
    """Kill a replica while requests run; returns what their clients saw."""
    victim = int(next(iter(replicas(at))).rpartition("-")[2])
    asked = [list(expected)[n * 7 % len(expected)] for n in range(requests)]
    timer = threading.Timer(0.3, lambda: os.kill(victim, signal.SIGKILL))
    timer.start()
    seen = load(at, asked, expected, together=together)
    timer.join()
    return seen


def shares(at: str, expected: Answers, *, requests: int, together: int) -> tuple[Seen, float]:
    """Ask one expert alone; returns what clients saw, and the share of its answers that the busier replica gave."""

    def ended() -> dict[str, float]:
        return {name: each[0][1] for name, each in replicas(at, "tersor_ended_answers").items()}

    before = ended()
    hot = [key for key in expected if key[0] == SKILLS[0]]
    seen = load(at, [hot[n % len(hot)] for n in range(requests)], expected, together=together)
    counts = [value - before.get(name, 0) for name, value in ended().items()]
    return seen, max(counts) / sum(counts)


def wait_for_all(at: str, seconds: float = 90) -> float:
    """Wait until there are all replicas again; returns the seconds it took."""
    began = time.monotonic()
    while len(replicas(at)) < REPLICAS and time.monotonic() - began < seconds:
        time.sleep(0.2)
    return time.monotonic() - began
