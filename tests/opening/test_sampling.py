"""The sampler's guarantees, for every number of models, rounds and instances."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from tersor._errors import TersorError
from tersor.opening.records import Instance
from tersor.opening.sampling import add_model, all_pairs, answered_by_both, roaming, versus_baseline


def instances(*sizes: int, first: int = 1) -> list[Instance]:
    return [
        Instance(f"{task:02}01{n:03}", str(task), "1", str(n), "", "", (), ())
        for task, size in enumerate(sizes, first)
        for n in range(size)
    ]


def models(count: int) -> list[str]:
    return [f"model {n}" for n in range(count)]


@pytest.mark.parametrize("count", range(2, 15))
@pytest.mark.parametrize("sizes", [(1,), (7,), (20,), (40,), (1, 7, 20, 40)], ids=str)
def test_guarantees(count: int, sizes: tuple[int, ...]) -> None:
    given, names = instances(*sizes), models(count)
    pairs = count * (count - 1) // 2
    for rounds in range(1, 7):
        if rounds > pairs:
            with pytest.raises(TersorError, match=f"must be from 1 to {pairs}"):
                roaming(given, names, rounds)
            continue
        found = roaming(given, names, rounds, seed=3)
        assert len(found) == rounds * len(given)
        assert len({each.id for each in found}) == len(found)  # no pair twice on an instance
        assert all(each.a != each.b for each in found)
        assert set(Counter(each.uid for each in found).values()) == {rounds}
        uses = Counter(dict.fromkeys(names, 0))
        for each in found:
            uses.update(each.pair)
        # Each is within the number of tasks from the middle between the most and the least used.
        assert max(uses.values()) - min(uses.values()) <= 2 * len(sizes)
        first_round = found[: len(given)]
        for task in {each.task for each in first_round}:
            places = Counter(dict.fromkeys(names, 0))
            for each in (each for each in first_round if each.task == task):
                places[each.a] += 1
                places[each.b] -= 1
            assert all(abs(place) <= 1 for place in places.values())


def test_the_first_round_is_a_ring() -> None:
    found = roaming(instances(10), models(5), 1)
    assert all(one.b == two.a for one, two in itertools.pairwise(found))
    assert {each.a for each in found[:5]} == set(models(5))


def test_each_task_has_a_ring_of_its_own() -> None:
    found = roaming(instances(8, 8, 8), models(8), 1)
    rings = [tuple(each.a for each in found if each.task == f"0{task}.01") for task in (1, 2, 3)]
    assert len(set(rings)) == 3


def test_other_tasks_and_the_order_of_files_change_nothing() -> None:
    small, large = instances(7, 20), instances(7, 20, 9)
    one, two = roaming(small, models(6), 3, seed=1), roaming(large[::-1], models(6)[::-1], 3, seed=1)
    assert one != roaming(small, models(6), 3, seed=2)
    assert set(one) == {each for each in two if each.task != "03.01"}


def test_later_rounds_use_models_that_were_used_least() -> None:
    found = roaming(instances(40), models(8), 4)
    uids = {each.uid for each in found}
    here = [Counter(name for each in found if each.uid == uid for name in (each.a, each.b)) for uid in uids]
    assert sum(len(each) == 8 for each in here) >= 0.8 * len(uids)  # all eight once, in all but a few


def test_orientation_is_balanced() -> None:
    for found in (roaming(instances(40), models(5), 6), all_pairs(instances(40), models(5))):
        places = Counter()
        for each in found:
            places[each.a] += 1
            places[each.b] -= 1
        assert max(map(abs, places.values())) <= 4


def test_all_pairs_and_a_baseline() -> None:
    given = instances(3, 2)
    assert len({each.id for each in all_pairs(given, models(4))}) == 5 * 6
    found = versus_baseline(given, models(4), "model 2")
    assert len(found) == 5 * 3 and all("model 2" in each.pair for each in found)
    with pytest.raises(TersorError, match="none of the models"):
        versus_baseline(given, models(4), "x")


def test_a_new_model_only_adds_battles_of_its_own() -> None:
    given = instances(12)
    before = roaming(given, models(5), 2)
    added = add_model("new", before, given, models(5), rounds=2)
    assert len(added) == 24 and all("new" in each.pair for each in added)
    assert not {each.id for each in before} & {each.id for each in added}
    opponents = Counter(next(iter(each.pair - {"new"})) for each in added)
    assert max(opponents.values()) - min(opponents.values()) <= 1
    assert add_model("new", [*before, *added], given, models(5), rounds=2) == []
    with pytest.raises(TersorError, match="from 1 to 5"):
        add_model("new", before, given, models(5), rounds=6)


def test_one_model_and_names_that_come_twice_are_refused() -> None:
    with pytest.raises(TersorError, match="at least 2 models"):
        roaming(instances(3), ["x"])
    with pytest.raises(TersorError, match="'x' twice"):
        all_pairs(instances(3), ["x", "x"])


def test_instances_that_somebody_lacks_are_listed() -> None:
    given = instances(3)
    whole, lacking = answered_by_both(given, {"x": [each.uid for each in given], "y": [given[1].uid]})
    assert whole == [given[1]]
    assert lacking == {"y": [given[0].uid, given[2].uid]}
