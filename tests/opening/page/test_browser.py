"""The page in a real browser: two people vote at once, by keys and by clicks, with and without script."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from arena_runs import CONTESTANTS, make_run

from tersor.opening.page.app import PageSettings, arena_page
from tersor.opening.page.views import CHOICES
from tersor.opening.store import Store
from tersor.web.app import address, listen, serve

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BATTLES = 10

if CHROMIUM is None:
    pytest.skip("there is no Chromium on the PATH to try the page with", allow_module_level=True)
playwright: Any = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")


@contextmanager
def served(folder: Path, sent: list[str] | None = None, **settings: Any) -> Iterator[tuple[Store, str]]:
    """The page of a run on a port of its own; every header and body that goes out is added to ``sent``."""
    with Store.open(folder) as store:
        listening = listen("127.0.0.1", 0)
        app = arena_page(store, PageSettings(**settings))

        async def told(scope: Any, receive: Any, send: Any) -> None:
            async def tell(message: Any) -> None:
                if sent is not None:
                    sent.append(f"{message.get('headers')} {message.get('body', b'').decode('latin-1')}")
                await send(message)

            await app(scope, receive, tell)

        threading.Thread(target=serve, args=(told, listening), daemon=True).start()
        yield store, address(listening)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Person:
    """Somebody with a browser window, and all that it was sent."""

    def __init__(self, browser: Any, at: str, name: str, **window: Any) -> None:
        self.context = browser.new_context(**window)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        self.page.goto(at)
        self.page.fill("#name", name)
        self.page.click("text=Begin")

    def token(self) -> str:
        found = self.page.get_attribute("input[name=token]", "value")
        assert found
        return str(found)

    def press(self, key: str) -> None:
        self.page.wait_for_selector("input[name=token]", state="attached")
        self.page.wait_for_load_state("load")
        with self.page.expect_navigation():
            self.page.keyboard.press(key)


def test_two_people_vote_on_ten_battles_at_once_and_see_no_names(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, battles=BATTLES)
    sent: list[str] = []
    with served(tmp_path, sent) as (store, at):
        anna, bo = Person(browser, at, "Anna"), Person(browser, at, "Bo")
        meant: dict[str, str] = {}
        for turn in range(BATTLES // 2):
            assert anna.token() != bo.token(), "nobody is given what another one looks at"
            for person, key in ((anna, "1234"[turn % 4]), (bo, "4321"[turn % 4])):
                meant[person.token()] = key
                person.press(key)
        assert "others are looking at those that are left" in anna.page.inner_text("main")
        anna.page.reload()
        for person in (anna, bo):
            assert "All 10 battles have their votes" in person.page.inner_text("main")
            assert person.faults == []
        rows = store.raw("human:Anna") + store.raw("human:Bo")
        tokens = {
            (battle, who): token for battle, who, token in store.read("SELECT battle_id, annotator, token FROM lease")
        }
        assert {tokens[row.battle, row.judge.partition(":")[2]]: row.label for row in rows} == {
            token: CHOICES[key][0] for token, key in meant.items()
        }
        assert len(store.verdicts("human")) == BATTLES
        secrets = [*CONTESTANTS, "_output", "-o-", *(each.uid for each in store.instances())]
        secrets += [each.id for each in store.battles()]
        assert len(sent) > 60 and [secret for secret in secrets if any(secret in each for each in sent)] == []
        for person in (anna, bo):
            person.context.close()


def test_a_lost_lease_is_said_and_going_back_changes_the_vote(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, battles=2)
    with served(tmp_path, seconds=0.5) as (store, at):
        late = Person(browser, at, "Late")
        time.sleep(0.6)
        other = Person(browser, at, "Other")
        other.press("1")
        late.press("4")
        assert "somebody else has it now" in late.page.inner_text("main")
        assert "human:Late" not in store.judges()
        time.sleep(0.6)
        late.page.click("text=Next battle")
        late.press("2")
        assert [row.label for row in store.raw("human:Late")] == ["Tie(A)"]
        late.page.click("text=Back")
        assert "Tie, A slightly" in late.page.inner_text("[aria-pressed=true]")
        with late.page.expect_navigation():
            late.page.click("text=B is better")
        assert [row.label for row in store.raw("human:Late")] == ["B"]


def test_it_works_without_script_and_fits_a_phone(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, battles=2)
    with served(tmp_path) as (store, at):
        phone = Person(
            browser, at, "Zoë", java_script_enabled=False, viewport={"width": 390, "height": 844}, is_mobile=True
        )
        for _ in range(2):
            phone.page.click("text=A is better")
        assert [row.label for row in store.raw("human:Zoë")] == ["A", "A"]
        phone.context.close()
        narrow = Person(browser, at, "Bo", viewport={"width": 390, "height": 844})
        narrow.page.goto(f"{at}back")
        assert narrow.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_keys_do_not_vote_while_a_name_is_typed(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, battles=1)
    with served(tmp_path) as (store, at):
        person = Person(browser, at, "1234")
        assert person.token() and store.judges() == []
        person.page.keyboard.press("5")
        person.page.keyboard.press("Control+1")
        assert store.judges() == [] and person.faults == []
