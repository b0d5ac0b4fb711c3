"""`tersor experts router` from training to measuring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from router_models import EXPERTS, REQUESTS, RULES

from tersor.cli import run
from tersor.experts.router.routing import Router


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "requests.jsonl"
    right = {name: name == "math" for name in EXPERTS}
    rows = [{"text": r.text, "expert": r.expert, "right": right} for r in REQUESTS]
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def named(experts: dict[str, str] = EXPERTS) -> list[str]:
    return [part for name, what in experts.items() for part in ("--expert", f"{name}={what}")]


def test_train_and_eval(folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "router"
    train = [
        "experts",
        "router",
        "train",
        "--kind",
        "embedding",
        "--model",
        str(folders["embedding"]),
        "--data",
        str(data),
    ]
    assert run([*train, *named(), "--out", str(out), "--steps", "60", "--rate", "0.3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training_accuracy"]["value"] > 0.9
    assert not (out / "training.pt").exists()
    measure = ["experts", "router", "eval", str(out), "--data", str(data), "--training-data", str(data)]
    assert run([*measure, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"router", "n-grams"}
    assert found["router"]["end_task"]["oracle"]["value"] == pytest.approx(1 / 3)
    assert run(measure) == 0
    assert "answered right" in capsys.readouterr().out


def test_rules_on_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "rules.json"
    file.write_text(json.dumps(RULES))
    train = ["experts", "router", "train", "--kind", "rules", "--data", str(data), "--out", str(tmp_path / "router")]
    assert run([*train, *named(), "--rules", str(file)]) == 0
    assert Router.from_pretrained(tmp_path / "router").route("python").expert == "code"
    capsys.readouterr()
    for change, message in (
        ([*named(), "--model", "m"], "needs --rules"),
        ([*named({"math": "a", "art": "b"}), "--rules", str(file)], "of each of"),
        (["--expert", "math", "--rules", str(file)], "NAME=DESCRIPTION"),
    ):
        assert run([*train, *change]) == 2
        assert message in capsys.readouterr().err
    file.write_text("[]")
    assert run([*train, *named(), "--rules", str(file)]) == 2
