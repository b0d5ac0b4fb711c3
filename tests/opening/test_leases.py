"""People never get the same battle, unless more than one vote is wanted."""

from __future__ import annotations

import pytest

from tersor._errors import TersorError
from tersor.opening.leases import LeaseLostError, find, take, vote
from tersor.opening.page.views import voted
from tersor.opening.records import Battle
from tersor.opening.store import Store

BATTLES = [Battle.of(f"01010{n:02}", "01.01", "x", "y") for n in range(3)]


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path, create=True) as opened:
        opened.add_battles(BATTLES)
        yield opened


def test_two_people_get_different_battles_until_all_are_done(store) -> None:
    anna, bo = take(store, "anna"), take(store, "bo")
    assert [anna.battle, bo.battle] == BATTLES[:2]
    assert take(store, "anna") == find(store, anna.token)
    vote(store, anna.token, "A")
    third = take(store, "anna")
    assert third.battle == BATTLES[2]
    assert take(store, "cy") is None
    vote(store, third.token, "Tie(B)")
    vote(store, bo.token, "B")
    assert take(store, "anna") is None and take(store, "bo") is None
    assert len(store.verdicts("human")) == 3


def test_with_two_votes_a_battle_goes_to_two_people(store) -> None:
    assert take(store, "anna", votes=2).battle == take(store, "bo", votes=2).battle == BATTLES[0]
    assert take(store, "cy", votes=2).battle == BATTLES[1]


def test_the_side_of_a_battle_stays_for_a_person(store) -> None:
    first = take(store, "anna", now=0)
    again = take(store, "anna", now=10_000)
    assert (again.battle, again.order, again.token) == (first.battle, first.order, first.token)
    assert again.expires > first.expires


def test_a_vote_counts_for_the_answers_as_they_were_shown(store) -> None:
    lease = take(store, "anna")
    vote(store, lease.token, "A")
    (verdict,) = store.verdicts("human:anna")
    assert verdict.label == ("A" if lease.order == 0 else "B")
    assert verdict.first == ("x" if lease.order == 0 else "y")


def test_voting_twice_counts_once_and_going_back_changes_it(store) -> None:
    lease = take(store, "anna")
    for label in ("A", "A", "B"):
        vote(store, lease.token, label)
    assert [row.label for row in store.raw("human:anna")] == ["B"]
    assert find(store, voted(store, "anna")[-1][0]).battle == lease.battle
    assert voted(store, "bo") == []


def test_a_lease_is_lost_when_its_time_is_over_and_another_has_the_battle(store) -> None:
    anna = take(store, "anna", now=0)
    bo = take(store, "bo", now=601)
    assert bo.battle == anna.battle
    with pytest.raises(LeaseLostError, match="somebody else has it"):
        vote(store, anna.token, "A", now=602)
    vote(store, bo.token, "B", now=603)
    vote(store, bo.token, "A", now=5000)  # their own vote may still be changed
    assert [row.judge for row in store.raw("human:bo")] == ["human:bo"]


def test_a_late_vote_counts_where_nobody_else_came(store) -> None:
    vote(store, take(store, "anna", now=0).token, "A", now=5000)
    assert len(store.verdicts("human")) == 1


def test_an_unknown_token_is_refused(store) -> None:
    assert find(store, "nonsense") is None
    with pytest.raises(TersorError, match="no such lease"):
        vote(store, "nonsense", "A")
