"""`tersor train zipr1`: one training by the command, and what it refuses before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from zipr1 import MODEL, drawn

from tersor.cli import run


def questions(folder: Path, n: int = 8) -> str:
    lines = []
    for index, row in enumerate(drawn(n)):
        row["images"][0].save(folder / f"{index}.png")
        question = row["prompt"][0]["content"]
        lines.append(json.dumps({"image": f"{index}.png", "question": question, "answer": row["answer"][0]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


def arguments(folder: Path, *more: str) -> list[str]:
    more = more if "--min-tokens" in more else ("--min-tokens", "0", *more)
    return [
        "train", "zipr1", "--model", MODEL, "--data", questions(folder), "--out", str(folder / "run"), "--steps", "1",
        "--held-out", "3", "--questions", "1", "--thresholds", "0.8,0.975", "--learning-rate",
        "1e-4", "--max-completion-length", "2", *more,
    ]  # fmt: skip


def test_a_training_by_the_command_reports_as_json(tmp_path: Path, capsys) -> None:
    assert run(arguments(tmp_path, "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["n"] for row in told["after"]] == [3, 3, 3]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--learning-rate", "0"], "--learning-rate 0.0 must be above 0"),
        (["--thresholds", "0.9"], "--thresholds '0.9' must be at least two shares"),
        (["--thresholds", "0.9,0.8"], "in ascending order"),
        (["--thresholds", "a,b"], "--thresholds 'a,b'"),
        (["--objective", "reward"], "--objective 'reward' must be one of"),
        (["--verifier", "nothing"], "--verifier 'nothing' must be one of"),
        (["--held-out", "8"], "--held-out 8 leaves nothing of the 8 questions"),
        (["--min-tokens", "100"], "the prompt has 69 tokens"),
        (["--tau", "0.5"], "--thresholds"),
        (["--policy", "quantize"], "policy"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--efficiency-weight", "-1"], "--efficiency-weight -1.0 must not be negative"),
        (["--eval-threshold", "2"], "at most 1"),
        (["--lora", "-1"], "--lora -1 must be at least 0"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path: Path, more: list[str], message: str, capsys) -> None:
    assert run(arguments(tmp_path, *more)) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and message in said
    assert not (tmp_path / "run").exists()
