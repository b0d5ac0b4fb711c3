"""The script that asks a server whatever its document allows, for seconds."""

from __future__ import annotations

import pytest

pytest.importorskip("schemathesis", reason="it writes the requests")

import serving_fuzz


@pytest.mark.slow
def test_no_answer_is_of_500_or_above() -> None:
    assert serving_fuzz.fuzz(20) == 0


def test_most_requests_name_a_model_that_there_is() -> None:
    bodies = [{"model": "x" * n, "prompt": "y"} for n in range(1, 101)]
    known = [serving_fuzz.map_body(None, body)["model"] in serving_fuzz.NAMES for body in bodies]
    assert 60 < sum(known) < 90
    assert serving_fuzz.map_body(None, [1]) == [1] and serving_fuzz.map_body(None, {"model": 3}) == {"model": 3}
