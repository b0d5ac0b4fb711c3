"""One bank of small experts, and a server of each kind of batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra serve")
pytest.importorskip("prometheus_client", reason="the server needs the extra serve")
pytest.importorskip("openai", reason="the server is tested with its clients' own library")

from serving import NAMES, PROMPT, Live, live, make_bank, make_batcher, make_host, offline

from tersor import zoo
from tersor.experts.host import ExpertHost
from tersor.experts.router.routing import Router
from tersor.experts.server.engine import EngineSettings


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bank(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def host(bank: Path) -> Iterator[ExpertHost]:
    made = make_host(bank)
    yield made
    made.close()


@pytest.fixture(scope="session")
def reference(bank: Path) -> Iterator[ExpertHost]:
    """The same experts where no server is, to compare with."""
    made = make_host(bank)
    yield made
    made.close()


@pytest.fixture(scope="module")
def router() -> Router:
    return Router.from_pretrained(zoo.path("tiny-experts") / "router")


@pytest.fixture(scope="module", params=[pytest.param("static", marks=pytest.mark.slow), "continuous"])
def served(request: Any, host: ExpertHost, router: Router, bank: Path) -> Iterator[Live]:
    with live(host, make_batcher(request.param, host), router=router, bank=bank) as found:
        yield found


@pytest.fixture(scope="module")
def expected(reference: ExpertHost) -> dict[str, str]:
    return {name or "base": offline(reference, PROMPT, name, 12) for name in (None, *NAMES)}


@pytest.fixture(scope="module")
def strict(bank: Path) -> Iterator[Live]:
    """A server with keys and small limits."""
    host = make_host(bank)
    limits = {"keys": ("k1", "k2"), "max_body": 1000, "seconds": 0.4, "lenient": True, "log_prompts": True}
    with live(host, make_batcher("continuous", host, places=2), engine=EngineSettings(max_queue=3), **limits) as found:
        yield found
