"""A judge behind an endpoint for tests: chat completions over plain sockets, with faults that follow from a seed.

Its verdict follows from the two answers alone, so it is the same in both orders and in every run.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: What chat completions may be sent.
FIELDS = {
    "model", "messages", "temperature", "max_tokens", "max_completion_tokens", "response_format", "logprobs",
    "top_logprobs",
}  # fmt: skip
#: Shares of requests, as the acceptance of the arena has them.
FLAKY = {
    "429 wait": 0.075, "429": 0.075, "500": 0.05, "hang": 0.05, "truncated": 0.05, "no choices": 0.05, "prose": 0.03,
    "odd": 0.02,
}  # fmt: skip


class Endpoint:
    """The server; settings are those of `running`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = {
            "prefix": "/v1", "key": None, "latency": 0.0, "faults": {}, "seed": 0, "hang": 1.0, "wait": 0.2,
            "always": None, "thoughts": 0.0, "parts": 0.0, "model": "mock",
        } | settings  # fmt: skip
        self.open = self.most_open = self.requests = self.early = self.waited = self.connections = 0
        self.tries: Counter[str] = Counter()
        #: By connection and question: several battles may ask the same, and each waits only for what it was told.
        self.not_before: dict[tuple[int, str], float] = {}
        self.faults: Counter[str] = Counter()

    async def serve(self) -> None:
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0, limit=2**26, backlog=512)
        print(server.sockets[0].getsockname()[1], flush=True)
        async with server:
            await server.serve_forever()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split(" ", 2)
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in head.split("\r\n"))
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if path == "/stats":
                    status, extra, answer = 200, {}, json.dumps({
                        name: getattr(self, name) for name in ("most_open", "requests", "early", "waited", "faults")
                    }).encode()  # fmt: skip
                else:
                    self.open += 1
                    self.requests += 1
                    self.most_open = max(self.most_open, self.open)
                    try:
                        status, extra, answer = await self.answer(number, method, path, headers, body)
                    finally:
                        self.open -= 1
                lines = [f"HTTP/1.1 {status} x", "content-type: application/json", f"content-length: {len(answer)}"]
                lines += [f"{name}: {value}" for name, value in extra.items()]
                writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(
        self, connection: int, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        def refuse(status: int, why: str, **extra: str) -> tuple[int, dict[str, str], bytes]:
            return status, {name.replace("_", "-"): value for name, value in extra.items()}, json.dumps(
                {"error": {"message": why}}).encode()  # fmt: skip

        own = self.settings
        if self.settings["latency"]:
            await asyncio.sleep(own["latency"])
        if path != f"{own['prefix']}/chat/completions" or method != "POST":
            return refuse(404, f"nothing at {path}")
        if own["key"] and headers.get("authorization") != f"Bearer {own['key']}":
            return refuse(401, "Incorrect API key provided: " + headers.get("authorization", "none"))
        asked = json.loads(body)
        if unknown := set(asked) - FIELDS:
            return refuse(400, f"unknown fields {sorted(unknown)}")
        if asked["model"] != own["model"]:
            return refuse(404, f"no model {asked['model']}")
        if own["always"] == "new fields" and ("max_tokens" in asked or "temperature" in asked):
            name = "max_tokens" if "max_tokens" in asked else "temperature"
            return refuse(400, f"Unsupported parameter: '{name}'. Use 'max_completion_tokens' instead." if name ==
                          "max_tokens" else "Unsupported value: 'temperature'")  # fmt: skip
        if own["always"] in ("too large", "too large once") and (own["always"] == "too large" or len(body) > 20_000):
            return refuse(400, "maximum context length exceeded")
        if own["always"] == "bad request":
            return refuse(400, "I do not like it")
        content = asked["messages"][1]["content"]
        identity = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        turn = self.tries[identity]
        self.tries[identity] += 1
        told = self.not_before.pop((connection, identity), None)
        if told is not None and time.monotonic() < told:
            self.early += 1
        elif told is not None:
            self.waited += 1
        rng = random.Random(f"{own['seed']}:{identity}:{turn}")
        fault = own["always"] or next(iter(rng.choices(
            [*own["faults"], None], [*own["faults"].values(), 1 - sum(own["faults"].values())])))  # fmt: skip
        self.faults[str(fault)] += 1
        if fault == "429 wait":
            self.not_before[connection, identity] = time.monotonic() + own["wait"]
            return refuse(429, "slow down", retry_after=str(own["wait"]))
        if fault == "429 date":
            if turn:
                return self.completion(content, asked, rng)
            self.not_before[connection, identity] = time.monotonic() + own["wait"]
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
            return refuse(429, "slow down", retry_after=date)
        if fault in ("429", "500"):
            return refuse(int(fault), "busy")
        if fault == "hang":
            await asyncio.sleep(own["hang"])
        if fault == "no choices":
            return 200, {}, b'{"choices": []}'
        if fault == "refusal":
            return 200, {}, json.dumps({"choices": [{"message": {"content": None, "refusal": "no"}}]}).encode()
        status, extra, said = self.completion(content, asked, rng, fault)
        return status, extra, said[: len(said) // 2] if fault == "truncated" else said

    def completion(
        self, content: list[dict[str, Any]], asked: dict[str, Any], rng: random.Random, fault: str | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        words = verdict(content)
        if fault == "prose":
            words = "Both answers are interesting."
        if fault == "odd":
            words = f"**Verdict:** {words.replace('(', ' (')}."
        limit = asked.get("max_tokens") or asked.get("max_completion_tokens")
        message: dict[str, Any] = {"role": "assistant", "content": words}
        finish = "stop"
        if rng.random() < self.settings["thoughts"]:
            message["reasoning_content"] = "Let me see. A is better? " * 20
            if limit < 200:
                message["content"], finish = None, "length"
        elif rng.random() < self.settings["parts"]:
            message["content"] = [{"type": "text", "text": words[:3]}, {"type": "text", "text": words[3:]}]
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finish}
        if asked.get("logprobs"):
            choice["logprobs"] = {"content": [{"top_logprobs": [
                {"token": "A", "logprob": -0.3566749}, {"token": " B", "logprob": -1.2039728}]}]}  # fmt: skip
        answer = {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 4}}
        return 200, {}, json.dumps(answer).encode()


def verdict(content: list[dict[str, Any]]) -> str:
    """The words for two answers: the one whose hash is larger is better, and a tie if they are close."""
    text = "".join(part.get("text") or part["image_url"]["url"] for part in content)
    text = re.sub(r"</?IMG_\d+>", "", text)  # pictures are counted through, whoever's they are
    first, second = re.search(r"<OUTPUT_A>: (.*)\n<OUTPUT_B>: (.*)\n\n", text, re.DOTALL).groups()  # type: ignore[union-attr]
    one, two = (int(hashlib.sha256(each.strip().encode()).hexdigest()[:8], 16) for each in (first, second))
    side = "A" if one > two else "B"
    return f"Tie({side} is better)" if abs(one - two) < 2**29 else f"{side} is better"


class Running:
    """A server that runs: its address, and what it has seen."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.base = process, f"http://127.0.0.1:{port}"

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.base}/stats", timeout=10) as reply:
            found: dict[str, Any] = json.load(reply)
        return found


@contextmanager
def running(**settings: Any) -> Iterator[Running]:
    """The server in a process of its own.

    Args:
        **settings: ``prefix`` of the path, the ``key`` wanted, ``latency`` in seconds, shares of ``faults``, one fault
            ``always``, shares of ``thoughts`` before the answer and of answers in ``parts``.
    """
    command = [sys.executable, str(Path(__file__)), json.dumps(settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Running(process, int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    asyncio.run(Endpoint(json.loads(sys.argv[1])).serve())
