"""`tersor opening references`, `tersor train intjudge`: what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from arena import fill

from tersor.cli import run
from tersor.opening.judging.runner import run_judge
from tersor.opening.judging.scripted import ScriptedJudge
from tersor.opening.store import Store


@pytest.fixture
def decided(tmp_path: Path, mini_root: Path) -> Path:
    with Store.open(tmp_path / "run", create=True) as store:
        fill(store, mini_root, ["full", "pruned"], rounds=1, count=8)
        run_judge(store, ScriptedJudge.from_text("faults"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--held-out", "1"], "--held-out 1.0 must be inside (0, 1)"),
        (["--lora", "0"], "--lora 0 must be at least 1"),
        (["--model", "tiny-lm"], "reads no pictures"),
        (["--unseen", "x"], "--unseen 'x' is in no battle"),
        (["--judge", "human"], "human decided no battle"),
        (["--batch", "3"], "must be even"),
        (["--swap-weight", "1", "--no-swap-augment"], "swap_weight compares the two orders"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(decided, tmp_path, capsys, options, said) -> None:
    command = ["train", "intjudge", "--model", "tiny-judge", "--arena", str(decided), "--out", str(tmp_path / "out")]
    assert run([*command, "--judge", "scripted:faults", "--held-out", "0.5", *options]) == 2
    lines = [each for each in capsys.readouterr().err.splitlines() if "note:" not in each]
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "out").exists()


def test_four_bits_need_a_gpu(decided, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = ["train", "intjudge", "--model", "tiny-judge", "--arena", str(decided), "--out", str(tmp_path / "out")]
    assert run([*command, "--judge", "scripted:faults", "--held-out", "0.5", "--qlora"]) == 2
    assert "--qlora needs a CUDA device" in capsys.readouterr().err


def test_references_need_a_run_of_their_own(decided, capsys) -> None:
    assert run(["opening", "references", str(decided), "--model", "scripted:weak"]) == 2
    assert "give a run of its own for references" in capsys.readouterr().err


def test_a_judge_without_probabilities_cannot_abstain(decided, capsys) -> None:
    command = ["opening", "judge", str(decided), "--judge", "scripted:faults", "--abstain-below"]
    assert run([*command, "0.8"]) == 2
    assert "gives no probability" in capsys.readouterr().err
    assert run([*command, "0.4"]) == 2
    models = ["--baseline", "full", "--candidate", "pruned"]
    assert run(["opening", "compare", str(decided), *models, "--people", "human"]) == 2
    assert "--people needs --judge" in capsys.readouterr().err
