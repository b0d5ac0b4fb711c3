"""The soak, for seconds; the whole of it is slow."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra serve")
pytest.importorskip("prometheus_client", reason="the server needs the extra serve")
pytest.importorskip("httpx2", reason="its clients are httpx2's")

from tersor.experts.bench.soak import Soak, run_soak

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def check(soak: Soak, requests: int) -> None:
    """Nothing is lost, crossed, held or left."""
    assert soak.requests == requests and (soak.wrong, soak.lost) == (0, 0)
    assert soak.right > 0.7 * requests and soak.restarts >= 2, "numbers that are none, and a killed thread"
    assert soak.recovery is not None and soak.recovery < 10
    assert soak.resident[0] == soak.resident[1] and (soak.held, soak.handlers) == (0, 0)
    assert set(soak.statuses) <= {200, 400, 404, 413, 500, 503} and soak.statuses[500] == 1


@pytest.mark.slow
def test_nothing_is_lost_while_clients_leave_experts_swap_and_threads_die() -> None:
    check(run_soak(seconds=3, requests=60, concurrency=12, seed=3, on_progress=lambda _: None), 60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_minutes_leave_the_memory_as_it_was() -> None:
    soak = run_soak(seconds=600, requests=2000, concurrency=32, seed=1, on_progress=lambda _: None)
    check(soak, 2000)
    assert soak.memory[1] <= 1.02 * soak.memory[0]
