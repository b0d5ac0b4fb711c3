"""Pairs: nothing leaks by instance or model, caps hold, and places are balanced."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from tersor._errors import TersorError
from tersor.opening.intjudge.pairs import (
    SAID,
    Parts,
    Source,
    balanced,
    check_apart,
    content,
    digest,
    flipped_at_random,
    pairs_of,
    split,
)
from tersor.opening.intjudge.world import SEEN, UNSEEN, World

NAMES = [each.name for each in UNSEEN]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    world = World(tmp_path_factory.mktemp("pictures"), 0)
    instances = world.instances(60)
    return [world.arena(instances, (*SEEN, *UNSEEN), 150), world.references(instances, SEEN)]


def test_no_instance_and_no_unseen_model_is_in_training_and_validation(sources) -> None:
    parts = split(sources, unseen=NAMES, held_out=0.3, seed=1)
    trained = {content(pair.instance) for pair in parts.training}
    assert trained and not trained & {content(pair.instance) for pair in parts.validation}
    assert not {name for pair in parts.training for name in (pair.verdict.a, pair.verdict.b)} & set(NAMES)
    assert {name for pair in parts.validation for name in (pair.verdict.a, pair.verdict.b)} & set(NAMES)
    assert {pair.kind for pair in parts.validation} == {"arena"}
    assert 0.15 < len({content(pair.instance) for pair in parts.validation}) / 60 < 0.45


def test_the_same_question_under_another_name_stays_on_its_side(sources) -> None:
    arena = sources[0]
    names = {each.uid: each.uid.replace("0101", "0909", 1) for each in arena.instances}
    other = Source(
        "arena", [replace(each, uid=names[each.uid]) for each in arena.instances],
        {model: {names[uid]: steps for uid, steps in own.items()} for model, own in arena.answers.items()},
        [replace(each, uid=names[each.uid], battle="x" + each.battle) for each in arena.verdicts],
    )  # fmt: skip
    parts = split([arena, other], held_out=0.3)
    sides = [{pair.instance.uid[4:] for pair in pairs} for pairs in (parts.training, parts.validation)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_a_leak_is_found(sources) -> None:
    parts = split(sources, unseen=NAMES, held_out=0.3)
    with pytest.raises(TersorError, match="is in training and validation"):
        check_apart(Parts(parts.training + parts.validation[:1], parts.validation), ())
    with pytest.raises(TersorError, match="is unseen, and in a pair"):
        check_apart(parts, [parts.training[0].verdict.a])


def test_references_are_capped_and_what_is_left_out_is_counted(sources) -> None:
    parts = split(sources, held_out=0.2, ratio=0.5)
    kinds = Counter(pair.kind for pair in parts.training)
    assert kinds["reference"] == round(0.5 * kinds["arena"])
    pairs = sum(len(source.verdicts) for source in sources)
    assert len(parts.training) + len(parts.validation) + sum(parts.dropped.values()) == pairs
    assert parts.dropped["reference pair above the ratio"] > 0


def test_the_better_answer_stands_first_as_often_as_second(sources) -> None:
    parts = split(sources, held_out=0.2)
    for pairs in (parts.training, balanced(parts.training[:31], random.Random(1))):
        first = sum(pair.label in ("A", "Tie(A)") for pair in pairs)
        assert abs(2 * first - len(pairs)) <= 1


def test_a_swapped_pair_says_the_same_of_the_same_models(sources) -> None:
    pair = next(each for each in split(sources).training if each.label == "Tie(A)")
    other = pair.swapped()
    assert (other.first, other.second) == (pair.second, pair.first)
    assert (other.label, other.verdict.a) == ("Tie(B)", pair.verdict.b)
    assert other.swapped() == pair and other.battle.id == pair.battle.id
    assert SAID[pair.label] == "Tie(A is better)"


def test_ties_that_lean_to_nobody_equal_answers_and_missing_ones_make_no_pair(sources) -> None:
    arena = sources[0]
    first, second, third, *_ = arena.verdicts
    answers = {model: dict(own) for model, own in arena.answers.items()}
    answers[second.b][second.uid] = answers[second.a][second.uid]
    del answers[third.a][third.uid]
    dropped: Counter[str] = Counter()
    left = Source("arena", arena.instances, answers, [replace(first, label="Tie"), second, third])
    assert pairs_of(left, dropped) == []
    assert dropped == {"tie that leans to nobody": 1, "both answers the same": 1, "answer or instance missing": 1}


def test_an_unknown_unseen_model_and_nothing_to_train_on_are_refused(sources) -> None:
    with pytest.raises(TersorError, match=r"--unseen 'x' is in no battle; the models are seen 1"):
        split(sources, unseen=["x"])
    with pytest.raises(TersorError, match="nothing is left to train on"):
        split(sources, held_out=1.0)
    with pytest.raises(TersorError, match="nothing is left to validate on"):
        split(sources, held_out=1e-9)


def test_a_digest_changes_with_a_label_and_a_coin_with_half_of_them(sources) -> None:
    pairs = split(sources).training
    coin = flipped_at_random(pairs, 3)
    turned = sum(a.label != b.label for a, b in zip(pairs, coin, strict=True))
    assert 0.35 < turned / len(pairs) < 0.65
    assert digest(pairs) == digest(list(pairs)) != digest(coin)
