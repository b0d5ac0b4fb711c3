"""The page without a browser, and in one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import Live, live, make_batcher, make_host

from tersor.experts.host import ExpertHost
from tersor.experts.router.routing import Router

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def open_page(host: ExpertHost, router: Router) -> Iterator[Live]:
    with live(host, make_batcher("continuous", host), router=router, page=True) as found:
        yield found


def ask(served: Live, question: str, model: str, csrf: str | None = None, **more: Any) -> httpx2.Response:
    if csrf is None:
        found = re.search(r'name="csrf" value="([^"]*)"', httpx2.get(served.at, **more).text)
        assert found
        csrf = found[1]
    return httpx2.post(served.at, data={"csrf": csrf, "model": model, "question": question}, **more)


def test_the_page_shows_experts_with_their_bytes_and_who_answered(open_page: Live) -> None:
    answer = ask(open_page, "write pencil backwards", "auto")
    assert answer.status_code == 200 and '<strong id="expert">reverse</strong>' in answer.text
    assert re.search(r"of which the router was \d+ % sure", answer.text)
    report = open_page.host.memory_report()
    assert f"{report.base:,}" in answer.text and f"{report.total:,}" in answer.text
    assert "<td>reverse</td><td>device</td>" in answer.text
    assert '<pre id="answer">cadb</pre>' in ask(open_page, "bdac>", "reverse").text
    assert "script-src 'self'" in answer.headers["content-security-policy"] and "<script" not in answer.text


def test_what_is_wrong_is_said_on_the_page(open_page: Live) -> None:
    for question, model, status, said in (
        ("x", "nobody", 404, "does not exist"),
        (" ", "add", 400, "1 to 4000 letters"),
        ("a" * 4001, "add", 400, "1 to 4000 letters"),
        ("a" * 600, "add", 400, "together more than"),
    ):
        answer = ask(open_page, question, model)
        assert answer.status_code == status and said in answer.text and 'role="alert"' in answer.text
    assert ask(open_page, "x", "add", csrf="other").status_code == 403
    assert httpx2.post(open_page.at, content=b"a" * 200_000).status_code == 413


def test_what_is_asked_is_text_and_never_markup(open_page: Live) -> None:
    answer = ask(open_page, "<script>alert(1)</script>", "nobody<b>")
    assert "<script>" not in answer.text and "&lt;script&gt;" in answer.text and "nobody<b>" not in answer.text


def test_where_keys_are_needed_a_key_is_the_password(bank: Path) -> None:
    host = make_host(bank)
    with live(host, make_batcher("static", host), keys=("k1",), page=True) as served:
        refused = httpx2.get(served.at)
        assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
        assert httpx2.get(served.at, auth=("me", "k2")).status_code == 401
        assert httpx2.get(served.at, auth=("me", "k1")).status_code == 200
        assert httpx2.post(served.at, data={"question": "x"}).status_code == 401
        assert httpx2.get(served.at, headers={"authorization": b"Basic \xff"}).status_code == 401
        assert "cadb" in ask(served, "bdac>", "reverse", auth=("me", "k1")).text
    host.close()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH to try the page with")
def test_a_question_is_answered_in_a_browser_and_the_page_fits_a_phone(open_page: Live) -> None:
    playwright: Any = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 640})
        faults: list[str] = []
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.goto(open_page.at)
        page.fill("#question", "what is 12 plus 345?")
        page.select_option("#model", "auto")
        page.click("text=Ask >> nth=-1")
        assert page.inner_text("#expert") == "add"
        assert page.input_value("#question") == "what is 12 plus 345?"
        assert page.evaluate("document.documentElement.scrollWidth") <= 360 and faults == []
        browser.close()
