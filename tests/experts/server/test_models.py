"""Experts that come and go while others answer, and the router's name."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from serving import NAMES, PROMPT, Live, error_of, keyed, post


def test_a_name_that_is_loaded_anew_answers_as_its_new_content(
    served: Live, bank: Path, expected: dict[str, str]
) -> None:
    client = served.client()

    def swap(source: str) -> None:
        shutil.rmtree(bank / "swap", ignore_errors=True)
        shutil.copytree(bank / source, bank / "swap")

    for source in ("sort", "shift", "sort"):
        swap(source)
        assert post(served, "load_expert", {"name": "swap"}).status_code == 200
        for _ in range(2):  # the second time after the same prefix
            assert client.completions.create(model="swap", prompt=PROMPT).choices[0].text == expected[source]
        assert post(served, "unload_expert", {"name": "swap"}).json()["status"] == "unloaded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="swap", prompt=PROMPT)
    shutil.rmtree(bank / "swap")


@pytest.mark.parametrize("force", [False, True])
def test_an_expert_leaves_when_its_requests_have_ended_or_they_fail(served: Live, bank: Path, force: bool) -> None:
    body = {"model": "leaving", "prompt": PROMPT, "max_tokens": 200, "logit_bias": {"1": -100}}
    loaded = post(served, "load_expert", {"name": "leaving", "path": "reverse", "pin": True})
    assert loaded.json()["status"] == "device"
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(post, served, "completions", body)
        while not served.engine.users("leaving"):
            time.sleep(0.002)
        left = pool.submit(post, served, "unload_expert", {"name": "leaving", "force": force})
        time.sleep(0.05)
        if not left.done() and not force:
            assert error_of(post(served, "completions", body))["code"] == "expert_unloading"
        assert asked.result().status_code == (503 if force else 200), asked.result().text
        assert left.result().status_code == 200
    assert served.free() and "leaving" not in served.host.list_experts()


def test_what_cannot_be_loaded_or_unloaded_is_said(served: Live, strict: Live, bank: Path) -> None:
    (bank / "empty").mkdir(exist_ok=True)
    for body, status, param in (
        ({"name": "x", "path": "../base"}, 400, "path"),
        ({"name": "x", "path": "/etc"}, 400, "path"),
        ({"name": "x", "path": "a\0b"}, 400, "path"),
        ({"name": "x", "path": "empty"}, 400, "path"),
        ({"name": "auto", "path": "add"}, 409, "name"),
        ({"name": "add"}, 409, "name"),
        ({"name": "a b", "path": "add"}, 400, "path"),
        ({"name": 3, "path": "add"}, 400, "name"),
        ({}, 400, "path"),
    ):
        answer = post(served, "load_expert", body)
        assert (answer.status_code, error_of(answer)["param"]) == (status, param), (body, answer.text)
    assert post(served, "unload_expert", {"name": "nobody"}).status_code == 404
    assert set(served.host.list_experts()) == set(NAMES)
    refused = post(strict, "load_expert", {"name": "x"}, headers={"authorization": "Bearer k1"})
    assert refused.status_code == 403 and "--allow-runtime-updates" in error_of(refused)["message"]
    (bank / "empty").rmdir()


def test_without_a_router_auto_is_refused(strict: Live) -> None:
    answer = keyed(strict, {"model": "auto", "prompt": PROMPT})
    assert answer.status_code == 400 and "--router" in error_of(answer)["message"]
