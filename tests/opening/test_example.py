from __future__ import annotations

from pathlib import Path

from tersor.opening import example
from tersor.opening.store import Store
from tersor.opening.summary import summarize


def test_the_known_order_is_found_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    with Store.open(tmp_path, create=True) as store:
        for _ in range(2):
            example.fill(store, seed=1)
            judge = example.decide(store, seed=1)
            assert len(store.battles()) == 6 * len(store.instances()) == 6 * 46
            assert len(store.raw(judge)) == 2 * 6 * 46
        told = summarize(store, judge)
    assert tuple(row["model"] for row in told["models"]) == example.ORDER
    assert told["position"]["coefficient"]["low"] > 0, "the judge's liking for the first place is seen"
