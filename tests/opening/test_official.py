"""The benchmark's own files: what is read is written again, and no label is guessed."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tersor._errors import TersorError
from tersor.opening.official import (
    Row,
    export_rows,
    import_verdicts,
    mean_scores,
    read_registry,
    read_rows,
    read_scores,
    verdict_rows,
    write_registry,
    write_rows,
    write_scores,
)
from tersor.opening.records import Battle, Score

NAMES = {"GPT-4o+DALL-E3": "7", "Emu2": "2", "Show-o": "5"}


def record(uid: str, a: str, b: str, winner: str | None = None) -> dict:
    found = {"data_id": uid, "model_A": {"id": NAMES[a], "name": a}, "model_B": {"id": NAMES[b], "name": b}}
    return found if winner is None else {**found, "winner": winner}


RECORDS = [
    record("0101001", "Emu2", "Show-o", "A"), record("0101001", "GPT-4o+DALL-E3", "Emu2", "Tie(A)"),
    record("0102003", "Show-o", "Emu2", "Tie(B)"), record("2301010", "GPT-4o+DALL-E3", "Show-o", "B"),
    record("0101001", "Emu2", "Show-o", "B"),  # the same pair once more
]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "verdicts.json"
    path.write_text(json.dumps(RECORDS, indent=2))
    return path


def multiset(records: list[dict]) -> Counter:
    return Counter(json.dumps(each, sort_keys=True) for each in records)


def test_verdicts_survive_the_store(store, file, tmp_path) -> None:
    found = import_verdicts(store, file, "human:paper")
    assert (found.recorded, found.extra) == (5, 4)
    write_rows(tmp_path / "again.json", export_rows(store, "human:paper"), store.get("registry"))
    assert multiset(json.loads((tmp_path / "again.json").read_text())) == multiset(RECORDS)
    assert import_verdicts(store, file, "human:paper").extra == 0
    assert len(store.raw("human:paper")) == 5


def test_final_words_become_rows_of_those_who_were_first(store, file) -> None:
    import_verdicts(store, file, "paper")
    rows = verdict_rows(store.verdicts("paper"))
    assert Row("2301010", "GPT-4o+DALL-E3", "Show-o", "B") in rows
    assert len(rows) == 4


def test_a_battle_the_other_way_round_is_turned(store, file) -> None:
    store.add_battles([Battle.of("0101001", "01.01", "Show-o", "Emu2")])
    found = import_verdicts(store, file, "paper")
    assert (found.flipped, found.extra) == (2, 3)
    verdict = next(each for each in store.verdicts("paper") if each.a == "Show-o" and each.uid == "0101001")
    assert (verdict.label, verdict.first) == ("B", "Emu2")


def test_labels_of_another_alphabet_are_left_out_or_repaired_and_said(store, tmp_path) -> None:
    labels = ["Tie ()", "tie(b)", "C", "a", "Tie (A is better)", "Model B is better", ""]
    rows = [record(f"01010{n:02}", "Emu2", "Show-o", label) for n, label in enumerate(labels)]
    (tmp_path / "odd.json").write_text(json.dumps(rows))
    found = import_verdicts(store, tmp_path / "odd.json", "j")
    assert found.recorded == 0 and found.rejected == Counter(labels)
    found = import_verdicts(store, tmp_path / "odd.json", "j", repair=True)
    assert [row.label for row in store.raw("j")] == ["Tie", "Tie(B)", "A", "Tie(A)", "B"]
    assert found.rejected == Counter(["C", ""]) and sum(found.repaired.values()) == 5


def test_battles_without_winners_are_read_and_written(tmp_path) -> None:
    rows = [Row("0101001", "Emu2", "Show-o")]
    write_rows(tmp_path / "battles.json", rows, NAMES)
    assert json.loads((tmp_path / "battles.json").read_text()) == [record("0101001", "Emu2", "Show-o")]
    assert read_rows(tmp_path / "battles.json") == (rows, {"Emu2": "2", "Show-o": "5"})


BAD = [
    "{", "{}", "[1]", '[{"data_id": "x"}]', json.dumps([record("x", "Emu2", "Emu2", "A")]),
    json.dumps([record("x", "Emu2", "Show-o") | {"data_id": 5}]), json.dumps([record("x", "Emu2", "Show-o")]),
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_files_of_another_kind_are_refused_by_name(store, tmp_path, text) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(TersorError, match=r"bad\.json"):
        import_verdicts(store, tmp_path / "bad.json", "j")
    assert store.judges() == []


def test_the_registry_and_scores_come_back(tmp_path) -> None:
    models = {"Emu2": {"id": "2", "github": "https://example.org"}, "Human": {"id": "0", "github": ""}}
    write_registry(tmp_path / "models.json", models)
    assert read_registry(tmp_path / "models.json") == models
    scores = [Score("0101001", "Emu2", {"Correctness": (7, "fine"), "Richness": (None, "")})]
    write_scores(tmp_path / "scores.json", scores, NAMES)
    assert read_scores(tmp_path / "scores.json") == (scores, {"Emu2": "2"})
    records = json.loads((tmp_path / "scores.json").read_text())
    records[0]["instance_id"] = records[0].pop("data_id")
    (tmp_path / "scores.json").write_text(json.dumps(records))
    assert read_scores(tmp_path / "scores.json")[0] == scores


def test_means_of_scores_are_rounded_as_the_benchmark_rounds_them() -> None:
    scores = [Score(str(n), "m", {"a": (points, ""), "b": (1, "")}) for n, points in enumerate((1, 2, 2))]
    scores.append(Score("9", "m", {"a": (None, ""), "b": (9, "")}))
    assert mean_scores(scores) == {"m": {"a": 1.67, "b": 1.0, "overall": 1.33, "n": 3, "dropped": 1}}
