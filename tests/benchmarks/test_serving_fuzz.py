"""The script that asks a server whatever its document allows, for seconds."""

from __future__ import annotations

import pytest

pytest.importorskip("schemathesis", reason="it writes the requests")

import serving_fuzz


@pytest.mark.slow
def test_no_answer_is_of_500_or_above() -> None:
    code, answers = serving_fuzz.fuzz(20)
    assert code == 0 and max(answers) < 500 and answers[200] > 20


def test_most_requests_name_a_model_that_there_is() -> None:
    bodies = [{"model": "x" * n, "prompt": "y"} for n in range(1, 101)]
    bodies = [{**body, "nonsense": 1} for body in bodies]
    assert 60 < sum("nonsense" not in serving_fuzz.map_body(None, body) for body in bodies) < 90
    known = [serving_fuzz.map_body(None, body)["model"] in serving_fuzz.NAMES for body in bodies]
    assert 60 < sum(known) < 90
    assert serving_fuzz.map_body(None, [1]) == [1] and serving_fuzz.map_body(None, {"model": 3}) == {"model": 3}
