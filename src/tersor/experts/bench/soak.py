"""A server under load for minutes, while clients leave, bodies are broken, experts come and go, and threads die.

Clients ask again after 429 and 503, as OpenAI's own does. Every answer is compared with what `generate` says offline,
so that one that was lost, or crossed with another request's, is counted.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import random
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tersor import zoo
from tersor._lazy import require
from tersor.bench.runs import OnProgress
from tersor.experts.bench.skills import SKILLS, examples
from tersor.experts.compress import compress_expert
from tersor.experts.host import ExpertHost
from tersor.experts.router.routing import Router
from tersor.experts.server.app import Server, api
from tersor.experts.server.batching import ContinuousBatcher
from tersor.experts.server.endpoint import ServerSettings
from tersor.experts.server.engine import Engine
from tersor.experts.server.models import Models
from tersor.web.app import address, listen

MODEL = "tiny-experts"
#: Of a client: how often it asks again, and for how many seconds it waits for an answer.
TRIES, PATIENCE = 8, 30.0
#: What else than plain questions is asked, and how often.
ODD = {"abort": 0.08, "oversize": 0.02, "malformed": 0.02, "unknown model": 0.02, "hot swap": 0.02, "long": 0.01}
#: When faults happen, as a share of the time.
NAN_AT, KILL_AT = 0.4, 0.6


@dataclass
class Soak:
    """What a run saw."""

    requests: int = 0
    right: int = 0
    wrong: int = 0
    lost: int = 0
    refused_right: int = 0
    """Broken requests that were answered with the error that they deserve."""
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """Of each answer that was right, all tries together."""
    tokens: int = 0
    wall: float = 0.0
    recovery: float | None = None
    """Seconds from the death of the batching thread to the next right answer."""
    resident: tuple[int, int] = (0, 0)
    """Bytes of experts on the device, before and after, with the same experts there."""
    memory: tuple[int, int] = (0, 0)
    """Bytes of the process, after a fifth of the time and at the end."""
    held: int = 0
    handlers: int = 0
    restarts: int = 0


class _Clients:
    """Workers that ask, each one question after the other."""

    def __init__(
        self, at: str, engine: Engine, expected: dict[tuple[str, str], str], routed: list[tuple[str, str]]
    ) -> None:
        self.at, self.engine, self.expected, self.routed = at, engine, expected, routed
        self.soak = Soak()
        self.swapping = asyncio.Lock()
        self.killed: float | None = None

    async def one(self, client: Any, rng: random.Random) -> None:
        """Ask something."""
        kind = rng.choices([*ODD, "plain"], [*ODD.values(), 1 - sum(ODD.values())])[0]
        self.soak.requests += 1
        if kind == "plain":
            await self.plain(client, rng)
        elif kind == "abort":
            await self.abort(client, rng)
        elif kind == "hot swap":
            await self.swap(client)
        else:
            body, wanted = {
                "oversize": (b"[" + b" " * 300_000, 413),
                "malformed": (b'{"model": ', 400),
                "unknown model": (json.dumps({"model": "nobody", "prompt": "abc>"}).encode(), 404),
                "long": (json.dumps({"model": "sort", "prompt": "a" * 2000}).encode(), 400),
            }[kind]
            answer = await client.post(f"{self.at}v1/completions", content=body, timeout=PATIENCE)
            self.soak.statuses[answer.status_code] += 1
            self.soak.refused_right += answer.status_code == wanted

    async def plain(self, client: Any, rng: random.Random) -> None:
        """Ask an expert, the base or the router, as a stream or not."""
        if rng.random() < 0.1:
            (prompt, model), name = rng.choice(self.routed), "auto"
        else:
            model, prompt = rng.choice(list(self.expected))
            name = model
        began = time.monotonic()
        for _ in range(TRIES):
            status, text, tokens = await self._ask(client, name, prompt, stream=rng.random() < 0.5)
            self.soak.statuses[status] += 1
            if status == 200:
                right = text == self.expected[model, prompt]
                self.soak.right += right
                self.soak.wrong += not right
                self.soak.tokens += tokens
                self.soak.seconds.append(time.monotonic() - began)
                if self.killed is not None and self.soak.recovery is None and began > self.killed:
                    self.soak.recovery = time.monotonic() - self.killed
                return
            await asyncio.sleep(0.3)
        self.soak.lost += 1

    async def _ask(self, client: Any, model: str, prompt: str, *, stream: bool) -> tuple[int, str, int]:
        body = {"model": model, "prompt": prompt, "max_tokens": 12, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        answer = await client.post(f"{self.at}v1/completions", json=body, timeout=PATIENCE)
        if answer.status_code != 200:
            return answer.status_code, "", 0
        if not stream:
            found = answer.json()
            return 200, found["choices"][0]["text"], found["usage"]["completion_tokens"]
        *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        if done != "[DONE]":
            return json.loads(done)["error"] and 503, "", 0
        chunks = [json.loads(each) for each in events]
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        return 200, text, chunks[-1]["usage"]["completion_tokens"]

    async def abort(self, client: Any, rng: random.Random) -> None:
        """Leave after a few pieces of a long answer."""
        body = {
            "model": rng.choice(SKILLS),
            "prompt": "abcd>",
            "max_tokens": 400,
            "stream": True,
            "logit_bias": {"1": -100},
        }
        with suppress(Exception):  # it may be refused while there is no batch
            async with client.stream("POST", f"{self.at}v1/completions", json=body, timeout=PATIENCE) as answer:
                left = rng.randrange(5)
                async for _ in answer.aiter_lines():
                    left -= 1
                    if left < 0:
                        break

    async def swap(self, client: Any) -> None:
        """Load an expert, ask it, and unload it; each time its name stands for another one."""
        async with self.swapping:
            source = SKILLS[self.soak.requests % len(SKILLS)]
            loaded = await client.post(
                f"{self.at}v1/load_expert", json={"name": "swap", "path": source}, timeout=PATIENCE
            )
            prompt = next(text for name, text in self.expected if name == source)
            for _ in range(TRIES):
                status, text, _ = await self._ask(client, "swap", prompt, stream=False)
                if status == 200:
                    break
                await asyncio.sleep(0.3)
            gone = await client.post(f"{self.at}v1/unload_expert", json={"name": "swap"}, timeout=PATIENCE)
            right = loaded.status_code == gone.status_code == 200 and text == self.expected[source, prompt]
            self.soak.right += right
            self.soak.wrong += not right


def run_soak(*, seconds: float, requests: int, concurrency: int, seed: int, on_progress: OnProgress) -> Soak:
    """Run a server under load.

    Args:
        seconds: Time over which requests are spread.
        requests: How many.
        concurrency: How many at once at most.
        seed: Of what is asked.
        on_progress: Told how far it is.
    """
    router = Router.from_pretrained(zoo.path(MODEL) / "router")
    with tempfile.TemporaryDirectory() as folder:
        bank = Path(folder)
        on_progress("packing the experts")
        host, bad = packed(bank)
        expected, routed = expected_answers(host, router, seed)
        for name in SKILLS:  # all are there before bytes are counted
            host.hold(name)
            host.release(name)
        batcher = ContinuousBatcher(host, places=16)
        with (
            Engine(host, batcher) as engine,
            serving(Server(Models(host, engine, router), ServerSettings(bank=bank, max_body=100_000))) as at,
        ):
            clients = _Clients(at, engine, expected, routed)
            asyncio.run(_drive(clients, bad, seconds, requests, concurrency, seed, on_progress))
            soak = clients.soak
            end = time.monotonic() + 15
            while engine.running and time.monotonic() < end:
                time.sleep(0.05)
            soak.held = sum(entry.running for entry in host._bank.entries())
            batch = batcher._batch
            soak.handlers = (
                0 if batch is None else len(batch.manager.output_router.result_handlers) + len(batch._requests)
            )
            soak.restarts = engine.restarts
        host.close()
    return soak


async def _drive(
    clients: _Clients, bad: Path, seconds: float, requests: int, concurrency: int, seed: int, on_progress: OnProgress
) -> None:
    httpx: Any = require("httpx2", "arena")
    rng, soak, host = random.Random(seed), clients.soak, clients.engine.host
    places = asyncio.Semaphore(concurrency)
    began, tasks, faults = time.monotonic(), set[asyncio.Task[None]](), {"nan": NAN_AT, "kill": KILL_AT}
    bytes_before = host.memory_report().total
    memory: list[int] = []
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=2 * concurrency)) as client:

        async def ask(own: random.Random) -> None:
            try:
                await clients.one(client, own)
            except Exception:  # whatever the client raises, there is no answer
                soak.lost += 1
            finally:
                places.release()

        for number in range(requests):
            wave = number - number % concurrency  # that many come at once
            await asyncio.sleep(max(0.0, began + seconds * wave / requests - time.monotonic()))
            await places.acquire()
            task = asyncio.create_task(ask(random.Random(rng.random())))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            for fault, at in list(faults.items()):
                if number >= at * requests:
                    del faults[fault]
                    if fault == "nan":
                        await _ask_bad(client, clients, bad)
                    else:
                        clients.killed = await asyncio.to_thread(kill_batch, clients.engine)
            if number % max(1, requests // 50) == 0:
                memory.append(_resident_memory())
                on_progress(
                    f"{number} of {requests} requests, {soak.right} right, {soak.wrong} wrong, {soak.lost} lost"
                )
        await asyncio.gather(*tasks)
    soak.wall = time.monotonic() - began
    soak.memory = memory[len(memory) // 5], _resident_memory()
    soak.resident = bytes_before, host.memory_report().total


async def _ask_bad(client: Any, clients: _Clients, bad: Path) -> None:
    """Load the expert that computes no numbers, ask it, and unload it."""
    await client.post(f"{clients.at}v1/load_expert", json={"name": "bad", "path": bad.name}, timeout=PATIENCE)
    for _ in range(TRIES):
        status, _, _ = await clients._ask(client, "bad", "abc>", stream=False)
        clients.soak.statuses[status] += 1
        if status == 500:
            break
        await asyncio.sleep(0.3)
    await client.post(f"{clients.at}v1/unload_expert", json={"name": "bad"}, timeout=PATIENCE)


def kill_batch(engine: Engine) -> float:
    """Have the thread that runs the batch end as if it had been killed; returns when."""
    while (batch := getattr(engine.batcher, "_batch", None)) is None or not batch.running:
        time.sleep(0.01)  # it is just being started again
    thread = batch.manager._generation_thread
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    return time.monotonic()


def packed(bank: Path) -> tuple[ExpertHost, Path]:
    """A host of the four experts, whose deltas are in ``bank`` with one that computes no numbers."""
    base, tokenizer = zoo.load(MODEL)
    host = ExpertHost(base)
    experts = zoo.load_experts(MODEL)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="no calibration data")
        for name, model in experts.items():
            compress_expert(base, model).save_pretrained(bank / name)
        broken = experts["add"]
        for linear in (broken.model.layers[0].mlp.up_proj, broken.model.layers[0].mlp.down_proj):
            linear.weight.mul_(1e30)
        compress_expert(base, broken).save_pretrained(bank / "bad")
    for name in (*experts, "bad"):
        tokenizer.save_pretrained(bank / name)
    for name in experts:
        host.load_expert(name, bank / name)
    return host, bank / "bad"


def expected_answers(
    host: ExpertHost, router: Router, seed: int
) -> tuple[dict[tuple[str, str], str], list[tuple[str, str]]]:
    """What each model answers to each prompt, and prompts with the expert that the router sends them to."""
    tokenizer = host.tokenizer(None)
    routed = [
        (text, router.route_all([text])[0].expert or "base")
        for text in ("what is 12 plus 345?", "write pencil backwards")
    ]
    asked = [(name, each.prompt) for name in SKILLS for each in examples(name, 12, seed=seed, held_out=True)]
    asked += [("base", prompt) for _, prompt in asked[:12]] + [(name, text) for text, name in routed]
    found = {}
    for name, prompt in asked:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = host.generate(ids, expert_names=[None if name == "base" else name], max_new_tokens=12, do_sample=False)
        found[name, prompt] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return found, routed


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """The address of a server that runs in a thread."""
    uvicorn: Any = require("uvicorn", "serve")
    listening = listen("127.0.0.1", 0)
    made = uvicorn.Server(
        uvicorn.Config(api(server), log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=made.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not (made.started and server.engine.alive):
        time.sleep(0.01)
    yield address(listening)
    made.should_exit = True
    thread.join(10)


def _resident_memory() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * 4096 if file.is_file() else 0
