from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from arena_runs import decided

from tersor._errors import TersorError
from tersor.opening.report import facts, number, percent, render, standings
from tersor.opening.store import Store
from tersor.opening.summary import Told, summarize


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Told, dict[str, str], list[Any]]:
    folder = tmp_path_factory.mktemp("run")
    judge = decided(folder, rounds=6)
    with Store.open(folder) as store:
        told = summarize(store, judge)
        return told, {form: render(store, told, form) for form in ("html", "md", "json", "csv")}, store.battles()


def test_every_form_names_the_judge_and_how_far_it_can_be_trusted(
    rendered: tuple[Told, dict[str, str], list[Any]],
) -> None:
    told, text, _ = rendered
    for form in ("html", "md", "json", "csv"):
        assert told["judge"]["id"] in text[form], form
    assert "| 01 story writing |" in text["md"] and "01 story writing" in text["html"]
    for form in ("html", "md"):
        for words in ("same winner in both orders", "wins of the answer shown first", "log odds of being shown first",
                      "questions without a label", "prompt", "95% sandwich over 12 instances"):  # fmt: skip
            assert words in text[form], (form, words)


def test_the_page_holds_every_battle_with_both_answers_and_loads_nothing(
    rendered: tuple[Told, dict[str, str], list[Any]],
) -> None:
    _, text, battles = rendered
    page = text["html"]
    assert not re.search(r'(src|href)="(?!data:)', page) and "<svg" in page
    for uid in {each.uid for each in battles}:
        assert page.count(f"<summary>{uid} ") == 1
    assert page.count("this order; ") == len(battles) == 72
    answers = {(each.uid, name) for each in battles for name in (each.a, each.b)}
    assert page.count("<section><h3>") == len(answers), "each answer once"
    assert page.count("data:image/jpeg") > len(answers)


def test_without_battles_the_page_is_small(tmp_path: Path) -> None:
    judge = decided(tmp_path)
    with Store.open(tmp_path) as store:
        told = summarize(store, judge)
        page = render(store, told, "html", battles=False)
        assert "All battles" not in page and len(page) < 40_000
        assert "verdicts" not in json.loads(render(store, told, "json", battles=False))
        with pytest.raises(TersorError, match="--format 'pdf'"):
            render(store, told, "pdf")


def test_json_and_csv_hold_the_figures(rendered: tuple[Told, dict[str, str], list[Any]]) -> None:
    told, text, _ = rendered
    data = json.loads(text["json"])
    assert data["models"] == json.loads(json.dumps(told["models"])) and len(data["verdicts"]) == 72
    rows = list(csv.DictReader(io.StringIO(text["csv"])))
    assert [row["model"] for row in rows] == [row["model"] for row in told["models"]]
    assert float(rows[0]["fdt"]) == told["models"][0]["fdt"]["value"]
    assert float(rows[0]["fdt_low"]) <= float(rows[0]["fdt"]) <= float(rows[0]["fdt_high"])


def test_a_figure_that_does_not_exist_says_why() -> None:
    assert percent({"value": None, "low": None, "high": None, "reason": "no battle counts"}) == "– (no battle counts)"
    assert percent({"value": 0.5, "low": 0.25, "high": 0.75}) == "50.0 [25.0, 75.0]"
    assert number({"value": 1.234, "low": 1.0, "high": 2.0}, ".2f") == "1.23 [1.00, 2.00]"


def test_warnings_stand_in_the_head(rendered: tuple[Told, dict[str, str], list[Any]]) -> None:
    told = rendered[0]
    warned = told | {"judge": told["judge"] | {"contestant": "weak"}, "components": [["a", "b"], ["c", "d"]]}
    said = [value for name, value in facts(warned) if name == "warning"]
    assert "the judge is a contestant, weak" in said[0] and "a, b; c, d" in said[1]
    assert [value for name, value in facts(told) if name == "warning"] == []


def test_standings_go_by_rank_within_each_group(rendered: tuple[Told, dict[str, str], list[Any]]) -> None:
    ranks = [10**6 if row[0] == "–" else int(row[0]) for row in standings(rendered[0])]
    assert ranks == sorted(ranks) and ranks[0] == 1, "a model without a finite strength stands last"
