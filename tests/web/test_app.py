from __future__ import annotations

import threading
import time
import urllib.request

import pytest
from starlette.testclient import TestClient

from tersor._errors import TersorError
from tersor.web.app import HEADERS, address, create_app, is_local, known_hosts, listen, serve


def test_every_answer_has_the_headers_and_the_app_tells_nothing_of_itself() -> None:
    client = TestClient(create_app())
    for path in ("/", "/docs", "/openapi.json", "/redoc"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_a_local_host_is_known_by_its_own_names_alone(host: str) -> None:
    assert is_local(host)
    names = known_hosts(host)
    assert names is not None and host in names and "evil.example" not in names


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::", "example.org"])
def test_another_host_is_not_local(host: str) -> None:
    assert not is_local(host) and known_hosts(host) is None


def test_a_local_server_is_not_reached_by_another_name() -> None:
    app = create_app(hosts=known_hosts("127.0.0.1"))
    for name in ("127.0.0.1:80", "[::1]:80", "[::1]", "localhost"):
        assert TestClient(app).get("/", headers={"host": name}).status_code == 404, name
    for name in ("evil.example:80", "evil.example", ""):
        assert TestClient(app).get("/", headers={"host": name}).status_code == 400, name


def test_a_port_that_is_taken_is_refused_and_a_free_one_answers() -> None:
    first = listen("127.0.0.1", 0)
    with pytest.raises(TersorError, match="--port 0 takes a free one"):
        listen("127.0.0.1", first.getsockname()[1])
    app = create_app()
    app.get("/")(lambda: "hello")
    threading.Thread(target=serve, args=(app, first), daemon=True).start()
    for _ in range(100):
        try:
            answer = urllib.request.urlopen(address(first), timeout=5)
            break
        except OSError:
            time.sleep(0.05)
    assert answer.read() == b'"hello"'
    assert "server" not in answer.headers and "date" not in answer.headers
