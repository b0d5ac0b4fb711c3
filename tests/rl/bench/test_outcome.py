"""What a model of tiny-vlm needs and answers, against the session's own figures."""

from __future__ import annotations

import pytest
import torch

from tersor import zoo
from tersor.kv.bench.tiles import KINDS, READ_IN, samples
from tersor.kv.bench.vision import questions_prompt
from tersor.kv.zipvl import ZipVL
from tersor.rl.bench.outcome import Outcome, ask, right_words

DRAWN = samples(4, seed=3, grid=8)


@pytest.fixture(scope="module")
def model():
    return zoo.load_model("tiny-vlm"), zoo.load_processor("tiny-vlm")


def test_tokens_cells_and_answers_are_counted_as_the_session_counts_them(model) -> None:
    found = ask(*model, DRAWN, 0.6, skip_layers=(0,))
    recipe = ZipVL(tau=0.6, skip_layers=(0,), min_tokens=0)
    inputs = questions_prompt(model[1], DRAWN)
    with torch.no_grad(), recipe.on(model[0]) as session:
        said = model[0](**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
        stats = session.stats
    words = model[1].tokenizer.convert_ids_to_tokens(said.tolist())
    assert found.right == [float(word == asked.answer) for word, (_, asked) in zip(words, DRAWN, strict=True)]
    assert found.ratio == pytest.approx(sum(stats.per_layer[1:]) / 7)
    assert found.visual_ratios() == pytest.approx(list(stats.visual_per_layer))
    assert found.by_kind().keys() == dict.fromkeys(KINDS).keys()
    for row, (_, asked) in enumerate(DRAWN):
        cells = [2 + r * 8 + c for r, c in asked.steps]
        seen = [token for layer in range(1, 8) for token in stats.kept[layer][row].tolist() if 2 <= token < 66]
        assert found.relevant[row] == pytest.approx(sum(token in cells for token in seen) / len(seen))
        kept = [cell in stats.kept[layer][row].tolist() for cell, layer in zip(cells, READ_IN, strict=False)]
        assert found.read[row] == pytest.approx(sum(kept) / len(kept))


def test_dense_attention_reads_everything_and_random_tokens_are_as_many(model) -> None:
    dense = ask(*model, DRAWN, 1.0)
    assert dense.accuracy == 1.0 and dense.ratios == []
    ours = ask(*model, DRAWN, 0.6)
    chance = ask(*model, DRAWN, 0.6, random=ours.visual_ratios(), seed=5)
    assert chance.visual_ratios() == pytest.approx(ours.visual_ratios(), abs=0.02)
    assert chance.accuracy < ours.accuracy
    assert ask(*model, DRAWN, 0.6, random=ours.visual_ratios(), seed=5) == chance


def test_a_check_counts_any_word_on_the_way(model) -> None:
    """With few tokens the model stops on the way, which is wrong by the answer and right by the check."""
    answer, check = (ask(*model, samples(20, seed=3, grid=8), 0.3, checked=checked) for checked in (False, True))
    assert all(one <= other for one, other in zip(answer.right, check.right, strict=True))
    assert answer.of_kind("look") == check.of_kind("look") and answer.accuracy < check.accuracy
    shown, asked = samples(1, seed=3, kinds=["trail"], grid=8)[0]
    words = right_words(shown, asked, checked=True)
    assert words[-1] == asked.answer and words[0] == shown.ask("look", asked.colour).answer


def test_kinds_are_told_apart() -> None:
    each = Outcome(right=[1.0, 0.0, 1.0], kinds=["look", "look", "trail"])
    assert each.by_kind() == {"look": 0.5, "trail": 1.0}
