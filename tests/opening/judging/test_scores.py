"""Points for single answers: read with care, recorded once, written in the benchmark's format."""

from __future__ import annotations

import json

import pytest

from tersor.cli import run as command
from tersor.opening.judging.client import ChatClient
from tersor.opening.judging.scores import CRITERIA, ScoreJudge, read_points, score_all
from tersor.opening.official import read_scores


def reply(points: object) -> str:
    return json.dumps({name: {"Score": points, "Justification": "so"} for name in CRITERIA})


@pytest.mark.parametrize("points", [0, 7, 10, 6.5])
def test_points_are_read_wherever_they_stand(points) -> None:
    for text in (
        reply(points),
        f"<think>10?</think>```json\n{reply(points)}\n```",
        json.dumps(dict.fromkeys(CRITERIA, points)),
    ):
        assert {value for value, _ in read_points(text).values()} == {points}
    assert read_points(reply(points))["Correctness"] == (points, "so")


@pytest.mark.parametrize(
    "text", ["", "seven", reply(11), reply(-1), reply("7"), reply(True), reply(None), "{", "{}", "[1]"]
)
def test_what_is_no_point_is_none(text) -> None:
    assert {value for value, _ in read_points(text).values()} == {None}


@pytest.fixture
def endpoint(monkeypatch):
    """Attempts that always end in seven points, counted."""
    from tersor.opening.judging.wire import Completion

    asked = []

    async def attempt(self, client, limiter, talk, tokens):
        asked.append(talk)
        return Completion(reply(7))

    monkeypatch.setattr(ChatClient, "attempt", attempt)
    return asked


def test_each_answer_is_scored_once(run, endpoint) -> None:
    judge = ScoreJudge(ChatClient("http://h", "m"))
    seen = []
    found = score_all(run, judge, lambda done, of: seen.append((done, of)))
    assert len(found) == len(endpoint) == 60 and seen[-1] == (60, 60)
    assert found == score_all(run, judge) == run.scores("endpoint:m")
    assert len(endpoint) == 60
    text = json.dumps(endpoint[0])
    assert "<OUTPUT>" in text and all(name in text for name in CRITERIA)


def test_an_answer_that_was_replaced_is_scored_again(run, endpoint) -> None:
    judge = ScoreJudge(ChatClient("http://h", "m"))
    score_all(run, judge)
    run.add_output("best", run.instances()[0].uid, (), "other")
    score_all(run, judge)
    assert len(endpoint) == 61


def test_the_command_writes_the_benchmarks_file(run, endpoint, tmp_path, capsys) -> None:
    arguments = ["opening", "score", str(run.folder), "--judge", "endpoint:m", "--base-url", "http://h"]
    assert command([*arguments, "--out", str(tmp_path / "scores.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"] == {
        **dict.fromkeys(CRITERIA, 7.0), "overall": 7.0, "n": 20, "dropped": 0,
    }  # fmt: skip
    assert len(read_scores(tmp_path / "scores.json")[0]) == 60
    assert command([*arguments[:4], "scripted:faults", *arguments[5:]]) == 2
