"""Which battles people are asked about."""

from __future__ import annotations

import pytest
from arena_verdicts import verdict

from tersor._errors import TersorError
from tersor.opening.asked import doubtful, read_asked, set_doubtful, set_sample
from tersor.opening.leases import take, vote
from tersor.opening.page.views import progress
from tersor.opening.records import Battle, Raw
from tersor.opening.store import Store

JUDGE = "hf:tiny"


@pytest.fixture
def judged(store: Store) -> list[Battle]:
    """Twenty battles; the judge gives the first answer of number ``n`` a probability of ``n / 20``, in both orders."""
    battles = [Battle.of(f"01010{n:02}", "01.01", "x", "y") for n in range(20)]
    store.add_battles(battles)
    store.add_judge(JUDGE, prompt_hash="p", prompt="", orders="both", settings={})
    rows = []
    for number, battle in enumerate(battles):
        for order in (0, 1):
            p = number / 20 if order == 0 else 1 - number / 20
            rows.append(Raw(battle.id, JUDGE, "p", order, label="A" if p > 0.5 else "B", probability=p))
    store.record(rows).result()
    return battles


def test_a_judge_doubts_where_neither_answer_has_the_probability(store: Store, judged) -> None:
    kept = set_doubtful(store, JUDGE, "p", 0.7)
    assert kept is not None and kept == read_asked(store)
    assert set(kept.doubtful) == {judged[number].id for number in range(7, 14)}
    assert set_doubtful(store, JUDGE, "p", 0.0) is None and read_asked(store) is None


def test_a_sample_is_of_the_others_and_leaves_the_doubtful_ones(store: Store, judged) -> None:
    set_doubtful(store, JUDGE, "p", 0.7)
    kept = set_sample(store, 5, seed=1)
    assert kept is not None and len(set(kept.sample)) == 5 and not set(kept.sample) & set(kept.doubtful)
    assert set_sample(store, 5, seed=1) == kept != set_sample(store, 5, seed=2)
    assert sorted(kept.order()) == sorted([*kept.doubtful, *kept.sample]) and kept.order() == kept.order()
    with pytest.raises(TersorError, match="more than the 13 battles"):
        set_sample(store, 14, seed=1)


def test_people_get_those_battles_alone_in_their_order(store: Store, judged) -> None:
    only = [judged[number].id for number in (9, 3, 12)]
    seen = []
    while (lease := take(store, "anna", only=only)) is not None:
        seen.append(lease.battle.id)
        vote(store, lease.token, "A")
        assert progress(store, "anna", 1, only) == (len(seen), len(seen), 3)
    assert seen == only
    assert take(store, "anna") is not None  # all battles without a list
    assert progress(store, "anna", 1) == (3, 3, 20)


def test_a_judge_without_probabilities_cannot_doubt() -> None:
    with pytest.raises(TersorError, match="gives no probability"):
        doubtful([verdict("1", "x", "y", "A")], 0.7)
