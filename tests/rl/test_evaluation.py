"""The frontier of accuracy against token ratio, counted against a plain loop."""

from __future__ import annotations

import pytest
import torch
from zipr1 import MODEL, data

from tersor import zoo
from tersor.kv.zipvl import ZipVL
from tersor.rl.data import prompt_inputs, with_pictures
from tersor.rl.evaluation import Frontier, frontier
from tersor.rl.verifiers import exact_match

TAUS = (0.5, 0.9, 1.0)


def test_the_frontier_is_what_each_question_gives_alone() -> None:
    net, processor, rows = zoo.load_model(MODEL), zoo.load_processor(MODEL), data(6)
    recipe = ZipVL(tau=0.9, min_tokens=0, skip_layers=(0,))
    told = []
    found = frontier(
        net, processor, rows, exact_match, recipe, TAUS, batch_size=4, max_new_tokens=2,
        on_batch=lambda tau, more: told.append((tau, more)),
    )  # fmt: skip
    assert told == [(tau, more) for more in (4, 2) for tau in TAUS]
    for each in found:
        for index, row in enumerate(rows):
            inputs = prompt_inputs(processor, [with_pictures(row)])
            own = ZipVL(tau=each.tau, min_tokens=0, skip_layers=(0,)).on(net)
            with torch.no_grad(), own as session:
                said = net.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]
                assert each.ratios[index] == pytest.approx(session.stats.token_ratio)
            text = processor.batch_decode(said, skip_special_tokens=True)[0]
            assert each.scores[index] == exact_match(text, row["answer"])
    assert found[2].ratio.value == 1.0
    assert found[0].by_layer()[0] == 1.0 > found[0].sparse_ratio((0,))
    assert found[0].sparse_ratio((0,)) == pytest.approx(sum(found[0].by_layer()[1:]) / 3)


def test_what_cannot_be_judged_is_left_out_of_accuracy_but_not_of_the_ratio() -> None:
    net, processor = zoo.load_model(MODEL), zoo.load_processor(MODEL)
    found = frontier(
        net, processor, data(4), lambda text, answer: None if answer == ["red"] else 1.0,
        ZipVL(tau=0.9, min_tokens=0), (0.9,), max_new_tokens=1,
    )  # fmt: skip
    assert len(found[0].ratios) == 4 and len(found[0].scores) == 4 - data(4)["answer"][:].count(["red"])


def test_a_summary_is_plain_json() -> None:
    each = Frontier(0.9, [1.0, 0.0], [0.4, 0.6], [2.0, 1.0])
    told = each.summary((0,))
    assert told["accuracy"] == 0.5 and told["token_ratio"] == 0.5 and told["token_ratio_by_layer"] == [1.0, 0.5]
    assert told["token_ratio_sparse_layers"] == 0.5 and told["n"] == 2
