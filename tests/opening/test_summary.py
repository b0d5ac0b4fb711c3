from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from arena_runs import CONTESTANTS, decided, make_run
from arena_verdicts import outcome, verdict

from tersor._errors import TersorError
from tersor.opening.leases import take, vote
from tersor.opening.records import Battle, Raw, from_both_orders, from_one_order
from tersor.opening.store import Store
from tersor.opening.summary import measures, position, repeatability, summarize


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    decided(folder, rounds=6)
    return folder


def test_a_summary_is_plain_json_and_names_its_judge(run: Path) -> None:
    with Store.open(run) as store:
        (judge,) = store.judges()
        told = json.loads(json.dumps(summarize(store, judge), allow_nan=False))
    assert told["judge"]["id"] == judge and "bias=0.5" in judge
    assert told["counts"]["decided"] == told["counts"]["battles"] == 72
    assert [row["model"] for row in told["models"]][-1] == "weak"
    assert sum(row["battles"] for row in told["models"]) == 144
    assert set(told["strengths"]["elo"]) == {"fdt", "half", "decisive", "davidson", "controlled"}
    assert told["position"]["coefficient"]["value"] > 0


def test_what_has_no_label_is_counted_by_its_kind_and_decides_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, battles=4)
    with Store.open(tmp_path) as store:
        store.add_judge("endpoint:m", prompt_hash="h", orders="both")
        one, two, three, _ = store.battles()
        rows = [Raw(one.id, "endpoint:m", "h", order, label="A") for order in (0, 1)]
        rows += [Raw(two.id, "endpoint:m", "h", 0, label="A"), Raw(two.id, "endpoint:m", "h", 1, status="unparsed")]
        rows += [Raw(three.id, "endpoint:m", "h", 0, status="refused")]
        store.record(rows).result()
        told = summarize(store, "endpoint:m")
    counts = told["counts"]
    assert (counts["decided"], counts["missing"], counts["asked"]) == (1, 3, 5)
    assert counts["without_label"] == {"refused": 1, "unparsed": 1}
    assert told["judge"]["prompt_hash"] == "h"
    # One battle: A first won both times, so its other half has it the other way round: a tie, and not consistent.
    assert told["position"]["consistent"]["value"] == 0 and counts["ties_divided_by_hash"] == 1


def test_position_figures_are_those_worked_out_by_hand() -> None:
    shown = [verdict(str(n), "x", "y", "A" if n < 6 else "B", first="x") for n in range(8)]
    shown += [verdict(str(n), "x", "y", "Tie(A)", first="y") for n in range(8)]
    final = [replace(each, consistent=n < 2, first=None) for n, each in enumerate(shown[:8])]
    told = position(final, shown)
    assert told["first_share"]["value"] == 6 / 8 and told["first_share_n"] == 8
    assert told["consistent"]["value"] == 2 / 8 and told["consistent_n"] == 8
    assert position([], shown[:6])["coefficient"]["reason"] == "the answer shown first always wins, or never"
    one = position(shown[:8], shown[:8])
    assert one["consistent"]["value"] is None and "both orders" in one["consistent"]["reason"]


def test_both_orders_take_the_first_place_out_of_the_final_words() -> None:
    """Equal answers, a judge that gives the first place log odds of 0.93 (72 of 100), no ties."""
    source, shown, final = random.Random(0), [], []
    for number in range(1500):
        battle = Battle.of(str(number), "01.01", "x", "y")
        rows = [Raw(battle.id, "j", order=order, label=outcome(source, 0.93)) for order in (0, 1)]
        shown += [from_one_order(battle, row) for row in rows]
        final.append(from_both_orders(battle, *rows))
    told = position(final, shown)
    assert told["first_share"]["value"] == pytest.approx(0.717, abs=0.03)
    assert told["coefficient"]["value"] == pytest.approx(0.93, abs=0.12)
    assert told["consistent"]["value"] == pytest.approx(2 * 0.717 * 0.283, abs=0.04)
    decisive = [each for each in final if each.label in ("A", "B")]
    assert sum(each.label == "A" for each in decisive) / len(decisive) == pytest.approx(0.5, abs=0.06)


def test_asking_again_is_compared_with_the_first_time() -> None:
    first = [verdict(str(n), "x", "y", "A") for n in range(10)]
    again = [verdict(str(n), "x", "y", "A" if n < 7 else "B") for n in range(10)]
    told = repeatability(first, again)
    assert told["same_pairs"]["value"] == 0.7 and told["same_pairs_n"] == 10
    assert repeatability(first, [])["same_pairs"]["reason"] == "the judge was not asked twice"


def test_a_judge_that_is_a_contestant_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, battles=1)
    with Store.open(tmp_path) as store:
        for judge in ("endpoint:zebra-7b", "endpoint:other"):
            store.add_judge(judge)
            store.record(Raw(store.battles()[0].id, judge, label="A")).result()
        assert summarize(store, "endpoint:zebra-7b")["judge"]["contestant"] == CONTESTANTS[0]
        assert summarize(store, "endpoint:other")["judge"]["contestant"] is None


def test_people_are_one_judge_and_their_agreement_is_told(tmp_path: Path) -> None:
    make_run(tmp_path, battles=3)
    with Store.open(tmp_path) as store:
        for who in ("Anna", "Bo"):
            while (lease := take(store, who, votes=2)) is not None:
                vote(store, lease.token, "A" if lease.order == 0 else "B", votes=2)
        told = summarize(store, "human")
    assert told["judge"]["people"] == 2 and told["counts"]["asked"] == 6
    (row,) = told["people"]
    assert (row["one"], row["other"], row["n"], row["fdt"]["value"]) == ("Anna", "Bo", 3, 1.0)


def test_a_panel_is_told_with_the_agreement_of_its_members(run: Path) -> None:
    with Store.open(run) as store:
        (judge,) = store.judges()
        told = summarize(store, f"panel:{judge}+{judge}")
        assert told["counts"]["asked"] == 2 * summarize(store, judge)["counts"]["asked"]
        assert told["people"][0]["fdt"]["value"] == 1 and told["counts"]["decided"] == 72


def test_one_model_no_battle_and_groups_that_never_met_give_reasons_and_no_nan(tmp_path: Path) -> None:
    make_run(tmp_path, battles=2)
    with Store.open(tmp_path) as store:
        store.add_judge("j")
        nothing = summarize(store, "j")
        assert nothing["models"] == [] and nothing["position"]["coefficient"]["value"] is None
        island = Battle.of(store.instances()[0].uid, "01.01", "p", "q")
        store.add_battles([island])
        store.record([Raw(each.id, "j", label="A") for each in store.battles()]).result()
        told = summarize(store, "j")
    json.dumps(told, allow_nan=False)
    assert len(told["components"]) == 2
    assert all("unbounded" in row["theta"]["reason"] for row in told["models"])
    with Store.open(tmp_path) as store, pytest.raises(TersorError, match="no judge 'nobody'"):
        summarize(store, "nobody")


def test_what_answers_differ_in_is_measured(run: Path) -> None:
    with Store.open(run) as store:
        found, model = measures(store), "weak"
        uid, steps = next(iter(store.outputs(model).items()))
        assert found["steps"][uid, model] == len(steps)
        assert found["letters"][uid, model] == sum(len(step.text) for step in steps)
        assert found["pictures"][uid, model] == sum(step.image is not None for step in steps)
