"""A bank of the experts of tiny-experts with a chat template, and servers of it on ports of their own."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import torch

from tersor import zoo
from tersor.experts.compress import compress_expert
from tersor.experts.host import ExpertHost
from tersor.experts.router.routing import Router
from tersor.experts.server.app import Server, api
from tersor.experts.server.batching import ContinuousBatcher, StaticBatcher
from tersor.experts.server.endpoint import ServerSettings
from tersor.experts.server.engine import Batcher, Engine, EngineSettings
from tersor.experts.server.models import Models
from tersor.experts.server.page import add_page
from tersor.web.app import address, listen

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NAMES = ("add", "reverse", "shift", "sort")
PROMPT = "bdac>"


def make_bank(folder: Path) -> Path:
    """Deltas of the four experts, with tokenizers that have a chat template; the base is beside them."""
    base, tokenizer = zoo.load("tiny-experts")
    tokenizer.chat_template = TEMPLATE
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no calibration data")
        for name, model in zoo.load_experts("tiny-experts").items():
            compress_expert(base, model).save_pretrained(folder / "bank" / name)
            tokenizer.save_pretrained(folder / "bank" / name)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "bank"


def make_host(bank: Path, **budgets: Any) -> ExpertHost:
    """The experts of a bank on their base."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(bank.parent / "base", dtype=torch.float32, local_files_only=True).eval()
    host = ExpertHost(base, **budgets)
    for name in NAMES:
        host.load_expert(name, bank / name)
    return host


def make_batcher(kind: str, host: ExpertHost, **settings: Any) -> Batcher:
    return ContinuousBatcher(host, **settings) if kind == "continuous" else StaticBatcher(host, **settings)


def offline(host: ExpertHost, prompt: str, name: str | None, tokens: int) -> str:
    """What `generate` answers, without its last tokens that end it."""
    tokenizer = host.tokenizer(name)
    ids = tokenizer(prompt)["input_ids"]
    out = host.generate(torch.tensor([ids]), expert_names=[name], max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


class Live:
    """A server that runs, and its parts."""

    def __init__(self, server: Server, at: str) -> None:
        self.server, self.engine, self.host, self.at = server, server.engine, server.engine.host, at

    def client(self, **settings: Any) -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.at}v1", **{"api_key": "none", "max_retries": 0, **settings})

    def free(self, seconds: float = 10) -> bool:
        """Whether nothing runs, waits or is held after a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            held = [entry.name for entry in self.host._bank.entries() if entry.running]
            if not (held or self.engine.running or self.engine.waiting.jobs):
                return True
            time.sleep(0.02)
        return False


@contextmanager
def live(
    host: ExpertHost,
    batcher: Batcher,
    *,
    engine: EngineSettings | None = None,
    router: Router | None = None,
    page: bool = False,
    **settings: Any,
) -> Iterator[Live]:
    """A server on a free port."""
    import uvicorn

    with Engine(host, batcher, engine) as running:
        server = Server(Models(host, running, router), ServerSettings(**settings))
        app = api(server)
        if page:
            add_page(app, server)
        listening = listen("127.0.0.1", 0)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        made = uvicorn.Server(config)
        thread = threading.Thread(target=made.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        end = time.monotonic() + 30
        while not (made.started and running.alive) and time.monotonic() < end:
            time.sleep(0.01)
        try:
            yield Live(server, address(listening))
        finally:
            made.should_exit = True
            thread.join(10)


def post(served: Live, path: str, body: Any, **more: Any) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(f"{served.at}v1/{path}", content=content, timeout=30, **more)


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"} and found["message"]
    return dict(found)


def keyed(strict: Live, body: Any) -> httpx2.Response:
    return post(strict, "completions", body, headers={"authorization": "Bearer k1"})
