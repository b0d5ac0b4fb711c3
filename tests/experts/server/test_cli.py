"""`tersor experts serve`: what it refuses at once, and a server that starts, answers, ends what runs and stops."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
from invoke import run

from tersor import zoo
from tersor.cli import app


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--host 0.0.0.0", "give --keys"),
        ("--keys nowhere.txt", "no such file"),
        ("--keys empty.txt", "holds no key"),
        ("--cache zipcache --batching continuous", "needs --batching static"),
        ("--cache nothing", "--cache 'nothing' is unknown"),
        ("--router nowhere", "nowhere: no router.json"),
        ("--base nowhere", "nowhere"),
        ("--timeout 0", "--timeout 0.0 must be above 0"),
        ("--max-queue 0", "max_queue=0"),
        ("--batching both", "'auto', 'continuous' or 'static'"),
        ("--places 0", "--places 0 must be above 0"),
        ("--step-tokens 2", "step_tokens=2"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    base = [] if "--base" in options else ["--base", str(bank.parent / "base")]
    with pytest.raises(ValueError) as refused:
        run(app, "experts", "serve", str(bank), "--port", "0", *base, *options.split())
    told = str(refused.value).replace("--max-queue ", "max_queue=").replace("--step-tokens ", "step_tokens=")
    assert said in told and "\n" not in told


def test_a_folder_without_deltas_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no delta"):
        run(app, "experts", "serve", str(tmp_path), "--port", "0")


@pytest.mark.slow
def test_a_server_answers_ends_what_runs_and_stops(bank: Path) -> None:
    router = zoo.path("tiny-experts") / "router"
    command = [sys.executable, "-m", "tersor", "experts", "serve", str(bank), "--base", str(bank.parent / "base")]
    server = subprocess.Popen(
        [*command, "--router", str(router), "--port", "0", "--grace", "20"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert server.stderr is not None
    lines: list[str] = []
    for line in server.stderr:
        lines.append(line)
        if found := re.search(r"4 experts, continuous batches: (http://\S+)", line):
            break
    assert found, lines
    rest = threading.Thread(target=lambda: lines.extend(server.stderr or ()))
    rest.start()
    assert httpx2.get(f"{found[1]}/models", timeout=30).json()["data"][-1]["id"] == "auto"
    body = {"model": "auto", "prompt": "what is 12 plus 345?", "max_tokens": 200, "stream": True}
    with httpx2.stream(
        "POST", f"{found[1]}/completions", json={**body, "logit_bias": {"1": -100}}, timeout=30
    ) as answer:
        chunks = answer.iter_lines()
        next(chunks)
        server.send_signal(signal.SIGTERM)
        assert [line for line in chunks if line][-1] == "data: [DONE]", "what runs is ended"
    assert server.wait(30) == 0
    rest.join(10)
    server.stderr.close()
    assert any('"status": 200, "expert": "add"' in line for line in lines)
    assert not any("Traceback" in line for line in lines)
