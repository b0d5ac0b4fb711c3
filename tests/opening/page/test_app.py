"""The page without a browser: what it sends, to whom, and what it records."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from arena_runs import CONTESTANTS, make_run
from PIL import Image
from starlette.testclient import TestClient

from tersor.opening.page.app import PageSettings, arena_page
from tersor.opening.page.views import CHOICES
from tersor.opening.store import Store

BATTLES = 3


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    make_run(tmp_path, battles=BATTLES)
    with Store.open(tmp_path) as opened:
        yield opened


def visit(store: Store, name: str | None = "Anna", app: Any = None, **settings: Any) -> TestClient:
    """A browser that signed in."""
    client = TestClient(app or arena_page(store, PageSettings(**settings)), base_url="http://127.0.0.1")
    if name is not None:
        assert enter(client, name).status_code == 200
    return client


def enter(client: TestClient, name: str, key: str = "") -> Any:
    csrf = field(client.get("/", params={"key": key}).text, "csrf")
    return client.post("/sign-in", data={"csrf": csrf, "name": name, "key": key})


def field(page: str, name: str) -> str:
    found = re.search(rf'name="{name}" value="([^"]*)"', page)
    assert found, page
    return found[1]


def cast(client: TestClient, choice: str, page: str | None = None) -> Any:
    page = page or client.get("/battle").text
    return client.post("/vote", data={"csrf": field(page, "csrf"), "token": field(page, "token"), "choice": choice})


def test_votes_are_recorded_as_they_were_meant_whichever_side_was_first(store: Store) -> None:
    client = visit(store)
    for choice in ("1", "2", "4"):
        assert cast(client, choice).status_code == 200
    assert "All 3 battles have their votes" in client.get("/battle").text
    rows = store.raw("human:Anna")
    assert [row.label for row in rows] == [CHOICES[choice][0] for choice in ("1", "2", "4")]
    for row, verdict in zip(rows, store.verdicts("human"), strict=True):
        assert verdict.first == (verdict.a if row.order == 0 else verdict.b)
        assert (verdict.label == row.label) == (row.order == 0)


def test_the_answer_called_a_is_the_one_that_the_vote_is_about(store: Store) -> None:
    """Pictures, texts and vote belong together: the first picture of answer A is of the model that gets the vote."""
    client = visit(store)
    for _ in range(BATTLES):
        page = client.get("/battle").text
        number = re.search(r'src="(/picture/[^"]*)" alt="Picture 1 of answer A"', page)
        assert number
        content = client.get(number[1]).content
        cast(client, "1", page)
        uid = store.read("SELECT uid FROM battle WHERE id = ?", store.raw("human:Anna")[-1].battle)[0][0]
        winner = next(v for v in store.verdicts("human") if v.uid == uid)
        model = winner.a if winner.label == "A" else winner.b
        step = store.outputs(model)[uid][0]
        assert step.image is not None
        assert colour(content) == pytest.approx(colour(step.image.read_bytes()), abs=6)


def colour(jpeg: bytes) -> tuple[int, ...]:
    found = Image.open(io.BytesIO(jpeg)).convert("RGB").getpixel((20, 20))
    assert isinstance(found, tuple)
    return found


def test_nothing_that_is_sent_names_a_contestant_or_a_file(store: Store) -> None:
    secrets = [*CONTESTANTS, *(name.lower() for name in CONTESTANTS), "_output", "-o-", "-i-", ".jpg", "uvicorn"]
    secrets += [each.uid for each in store.instances()] + [each.id for each in store.battles()]
    client = visit(store, None)
    answers = [client.get("/"), client.get("/nothing"), client.get("/static/page.js"), client.get("/static/../app.py")]
    answers.append(enter(client, "Anna"))
    for choice in ("1", "3", "4"):
        page = client.get("/battle")
        pictures = re.findall(r'src="(/picture/[^"]*)"', page.text)
        assert len(pictures) >= 2
        answers += [page, *(client.get(each) for each in pictures), cast(client, choice, page.text)]
        answers += [client.get("/back"), client.get(pictures[0] + "9"), client.get(pictures[0] + "x")]
        answers.append(client.post("/vote", data={"csrf": "", "token": "", "choice": "1"}))
    for answer in [*answers, *(former for each in answers for former in each.history)]:
        sent = answer.content.decode("latin-1") + str(answer.headers) + str(answer.url)
        assert [secret for secret in secrets if secret in sent] == [], answer.url
        assert not {"etag", "last-modified", "content-disposition", "server"} & set(answer.headers)
        assert answer.headers["cache-control"] == "no-store"


def test_a_picture_goes_out_as_pixels_alone(store: Store) -> None:
    client = visit(store)
    page = client.get("/battle").text
    file = store.outputs(CONTESTANTS[0])[store.battles()[0].uid][0].image
    assert file is not None
    exif = Image.Exif()
    exif[0x0131] = CONTESTANTS[0]
    Image.new("RGB", (2000, 40)).save(file, "JPEG", comment=CONTESTANTS[0], exif=exif)
    shown = [client.get(each).content for each in re.findall(r'src="(/picture/[^"]*)"', page)]
    assert CONTESTANTS[0].encode() in file.read_bytes()
    assert not any(CONTESTANTS[0].encode() in each for each in shown)


def test_a_picture_that_broke_is_not_shown_and_the_page_goes_on(store: Store) -> None:
    client = visit(store)
    page = client.get("/battle").text
    for model in CONTESTANTS:
        file = store.outputs(model)[store.battles()[0].uid][0].image
        assert file is not None
        file.write_bytes(b"no picture")
    shown = [client.get(each).status_code for each in re.findall(r'src="(/picture/[^"]*)"', page)]
    assert shown.count(404) == 2 and set(shown) <= {200, 404}
    assert cast(client, "1").status_code == 200


def test_the_sides_of_a_battle_differ_between_people_and_stay_for_each(store: Store) -> None:
    orders = set()
    for name in ("Anna", "Bo", "Cy", "Di", "Ed", "Flo", "Gil", "Hal", "Ivy", "Jo"):
        client = visit(store, name, votes=10)
        first, again = client.get("/battle").text, client.get("/battle").text
        assert field(first, "token") == field(again, "token")
        orders.add(store.read('SELECT "order" FROM lease WHERE annotator = ?', name)[0][0])
    assert orders == {0, 1}


def test_sending_a_vote_twice_counts_once_and_going_back_changes_it(store: Store) -> None:
    client = visit(store)
    page = client.get("/battle").text
    cast(client, "1", page)
    cast(client, "1", page)
    assert [row.label for row in store.raw("human:Anna")] == ["A"]
    second = client.get("/battle").text
    assert field(second, "token") != field(page, "token"), "the next battle"
    back = client.get("/back")
    assert field(back.text, "token") == field(page, "token") and 'value="1" aria-pressed="true"' in back.text
    cast(client, "4", back.text)
    assert [row.label for row in store.raw("human:Anna")] == ["B"]


def test_going_back_twice_goes_to_the_vote_before(store: Store) -> None:
    client = visit(store)
    tokens = []
    for choice in ("1", "2"):
        page = client.get("/battle").text
        tokens.append(field(page, "token"))
        cast(client, choice, page)
    back = client.get("/back", params={"before": field(client.get("/battle").text, "token")})
    assert field(back.text, "token") == tokens[1]
    assert field(client.get("/back", params={"before": tokens[1]}).text, "token") == tokens[0]


def test_a_lost_lease_records_nothing_and_says_so(store: Store) -> None:
    app = arena_page(store, PageSettings(seconds=0))
    anna, bo = visit(store, "Anna", app), visit(store, "Bo", app)
    late = anna.get("/battle").text
    theirs = bo.get("/battle").text
    cast(bo, "1", theirs)
    answer = cast(anna, "4", late)
    assert answer.status_code == 409 and "somebody else has it now" in answer.text
    assert "human:Anna" not in store.judges() and len(store.raw("human:Bo")) == 1


def test_a_lease_that_is_over_still_counts_where_nobody_else_wants_the_battle(store: Store) -> None:
    client = visit(store, seconds=0)
    assert cast(client, "1", client.get("/battle").text).status_code == 200
    assert len(store.raw("human:Anna")) == 1


def test_a_form_from_elsewhere_is_refused(store: Store) -> None:
    client, other = visit(store), visit(store, "Bo", votes=2)
    page = client.get("/battle").text
    for csrf in ("", "x", field(other.get("/battle").text, "csrf")):
        data = {"csrf": csrf, "token": field(page, "token"), "choice": "1"}
        assert client.post("/vote", data=data).status_code == 403
        assert client.post("/sign-in", data={"csrf": csrf, "name": "Eve"}).status_code == 403
    cookie = visit(store, None).get("/").headers["set-cookie"]
    assert "httponly" in cookie.lower() and "samesite=strict" in cookie.lower()


def test_nobody_sees_or_votes_on_what_another_one_was_given(store: Store) -> None:
    app = arena_page(store, PageSettings())
    anna, bo = visit(store, "Anna", app), visit(store, "Bo", app)
    page = anna.get("/battle").text
    picture = re.search(r'src="(/picture/[^"]*)"', page)
    assert picture and bo.get(picture[1]).status_code == 404 and anna.get(picture[1]).status_code == 200
    assert bo.get(f"/battle/{field(page, 'token')}").status_code == 404
    mine = bo.get("/battle").text
    stolen = {"csrf": field(mine, "csrf"), "token": field(page, "token"), "choice": "1"}
    assert bo.post("/vote", data=stolen).status_code == 404
    assert bo.post("/vote", data=stolen | {"token": field(mine, "token"), "choice": "5"}).status_code == 404
    assert store.judges() == []
    stranger = visit(store, None, app)
    assert "Your name" in stranger.get("/battle").text


def test_a_name_is_asked_for_and_may_have_to_be_on_the_list(store: Store) -> None:
    client = visit(store, None)
    for name in (" ", "x" * 61, "\x01"):
        assert enter(client, name).status_code == 400, name
    listed = visit(store, None, annotators=["Anna", "Bo"])
    assert "<option>Anna</option>" in listed.get("/").text
    assert enter(listed, "Eve").status_code == 403 and enter(listed, "Bo").status_code == 200


def test_where_others_reach_the_page_the_address_must_hold_its_key(store: Store) -> None:
    client = visit(store, None, key="k3y")
    assert enter(client, "Anna").status_code == 403
    assert enter(client, "Anna", "wrong").status_code == 403
    assert enter(client, "Anna", "k3y").status_code == 200


def test_another_hosts_name_is_refused(store: Store) -> None:
    app = arena_page(store, PageSettings(hosts=["127.0.0.1"]))
    assert TestClient(app, base_url="http://127.0.0.1:8000").get("/").status_code == 200
    assert TestClient(app, base_url="http://evil.example").get("/").status_code == 400


def test_answers_are_text_and_never_markup(tmp_path: Path) -> None:
    make_run(tmp_path, battles=1)
    with Store.open(tmp_path) as store:
        (battle,) = store.battles()
        for model in CONTESTANTS:
            steps = store.outputs(model)[battle.uid]
            store.add_output(model, battle.uid, [replace(steps[0], text="<script>alert(1)</script>")], "new")
        page = visit(store).get("/battle").text
    assert "<script>alert" not in page and page.count("&lt;script&gt;alert(1)") == 2


def test_an_empty_answer_and_a_missing_picture_are_shown_as_what_they_are(tmp_path: Path) -> None:
    make_run(tmp_path, battles=1)
    with Store.open(tmp_path) as store:
        (battle,) = store.battles()
        store.add_output(CONTESTANTS[0], battle.uid, [], "new")
        for step in store.outputs(CONTESTANTS[1])[battle.uid]:
            assert step.image is not None
            step.image.unlink()
        page = visit(store).get("/battle").text
    assert "(an empty answer)" in page and "of answer" not in page
