"""The table of ZipR1: rows by setting, way and seed, kept over interruptions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor import zoo
from tersor.bench.records import read_jsonl
from tersor.cli import run
from tersor.rl.bench import table
from tersor.rl.bench.arms import Plan, Setting
from tersor.rl.bench.outcome import Outcome
from tersor.rl.bench.table import Row, figures, over, run_table

PLAN = Plan(steps=1, questions=1, thresholds=(0.5, 0.975), grid=8, pictures=3)


def outcome(accuracy: int, ratio: float) -> Outcome:
    """Ten questions, of which ``accuracy`` are right."""
    return Outcome(
        right=[1.0] * accuracy + [0.0] * (10 - accuracy), kinds=["look"] * 4 + ["chain"] * 3 + ["trail"] * 3,
        ratios=[ratio] * 10, layers=[10 * ratio], visual=[10 * ratio], read=[1.0] * 10, relevant=[0.1] * 10,
    )  # fmt: skip


def made(accuracy: int, ratio: float) -> Row:
    return Row(outcome(accuracy, ratio), outcome(10, 1.0), outcome(2, ratio), [outcome(5, 0.1), outcome(10, 0.8)], [])


def test_figures_are_means_over_seeds_each_against_the_start_on_its_questions() -> None:
    found = figures([made(10, 0.3), made(9, 0.5)], [made(10, 0.8), made(8, 0.8)])
    assert found["ratio"].value == pytest.approx(0.4) and found["ratio"].low < 0.3
    assert found["lost"].value == pytest.approx((0.0 + 0.1) / 2)
    assert found["random"].value == pytest.approx(0.2) and found["trail"].value == pytest.approx((1 + 2 / 3) / 2)


def test_a_table_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, int]] = []

    def train(arm: str, source: Path, processor: object, plan: Plan, *, seed: int, setting: Setting):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((arm, seed))
        return zoo.load_model("tiny-vlm"), [{"token_ratio": 0.5}]

    monkeypatch.setattr(table, "train_arm", train)
    given = (
        zoo.path("tiny-vlm"), zoo.load_processor("tiny-vlm"), PLAN, ["pathwise", "literal"], ["every layer sparse"],
        [0, 1],
    )  # fmt: skip
    file = tmp_path / "rows.partial"
    with pytest.raises(KeyboardInterrupt):
        run_table(*given, n=1, progress=file)
    done = list(trained)
    trained[:] = []
    rows = run_table(*given, n=1, progress=file)
    assert done == [("pathwise", 0), ("literal", 0)] and trained == [("pathwise", 1), ("literal", 1)]
    starts = over(rows, "every layer sparse", "start")
    assert len(rows) == 6 and len(starts) == 2 and all(len(row.ends) == 2 for row in starts)
    assert len(over(rows, "every layer sparse", "literal")) == 2 and not rows["every layer sparse / literal / 0"].ends
    with pytest.raises(ValueError, match="other settings"):
        run_table(*given, n=2, progress=file)


def test_the_command_writes_a_record_of_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"every layer sparse / start / 0": made(10, 0.8), "every layer sparse / pathwise / 0": made(9, 0.3)}
    monkeypatch.setattr(table, "run_table", lambda *args, **options: rows)
    assert run(["bench", "zipr1", "--seeds", "1", "--samples", "1", "--out", str(tmp_path / "r.jsonl")]) == 0
    assert "pathwise" in capsys.readouterr().out
    found = {(each.item, each.quantity): each.measured for each in read_jsonl(tmp_path / "r.jsonl")}
    assert found["pathwise: every layer sparse", "tokens in attention, sparse layers"] == pytest.approx(0.3)
    assert found["start at the lowest threshold: every layer sparse", "right answers"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arm", "luck"], "--arm 'luck' must be one of"),
        (["--setting", "none"], "--setting 'none'"),
        (["--seeds", "0"], "--seeds 0"),
        (["--setting", "a check, no answers", "--arm", "given answers + ratio"], "needs answers; there are none"),
    ],
)
def test_what_there_is_not_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "zipr1", *options]) == 2
    assert message in capsys.readouterr().err
