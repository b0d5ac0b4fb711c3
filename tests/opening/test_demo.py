"""OpenING's demo: what its verdict follows from, by faked rankings."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import run_demo

from tersor.opening import demo
from tersor.opening.example import ORDER

SURE = [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("order", "ranks", "verdict"),
    [
        (ORDER, SURE, "holds"), (ORDER, [1, 1, 3, 4], "partly"), (ORDER, [1, 2, 3, None], "partly"),
        (ORDER[::-1], SURE, "fails"), ((ORDER[1], ORDER[0], *ORDER[2:]), SURE, "fails"),
    ],
)  # fmt: skip
def test_the_order_must_be_the_known_one_and_sure(
    order: tuple[str, ...], ranks: list[int | None], verdict: str
) -> None:
    assert demo.judge_order(order, ranks) == verdict


def test_tau_is_one_for_the_known_order_and_falls_with_each_exchange() -> None:
    assert demo.tau(ORDER) == 1 and demo.tau(ORDER[::-1]) == -1
    assert demo.tau((ORDER[1], ORDER[0], *ORDER[2:])) == pytest.approx(4 / 6)


def faked(order: tuple[str, ...]) -> list:
    models = [{"model": model, "theta": {"value": 1.0 - place}, "rank": place + 1} for place, model in enumerate(order)]
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    place = {"consistent": figure, "consistent_n": 10, "coefficient": figure}
    return demo._records(
        {"models": models, "counts": {"decided": 10, "asked": 20}, "position": place}, [], "scripted:x"
    )


def test_a_ranking_that_is_wrong_fails() -> None:
    assert faked(ORDER)[0].verdict == "holds"
    lost = faked(ORDER[::-1])[0]
    assert lost.verdict == "fails" and lost.measured == -1


def test_the_demo_names_its_judge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records, page = run_demo("opening", monkeypatch, tmp_path)
    assert all("scripted:faults" in each.item and "scripted:faults" in each.model for each in records)
    assert "It is no trained judge" in page and records[0].verdict in ("holds", "partly", "fails")
