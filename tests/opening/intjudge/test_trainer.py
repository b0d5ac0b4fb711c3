"""The trainer: what it learns from, the ends of answers, and its losses against brute force."""

from __future__ import annotations

import pytest
import torch
from judges import PROMPT, config, parts_of, untrained

from tersor._errors import TersorError, WrongTypeError
from tersor.opening.intjudge.lora import adapters
from tersor.opening.intjudge.losses import SIGNS, margin
from tersor.opening.intjudge.pairs import SAID, Pair
from tersor.opening.intjudge.trainer import SIGN, WEIGHT, IntJudgeTrainer, PairSampler, Rows
from tersor.opening.judging.base import Question
from tersor.opening.judging.local import LocalJudge
from tersor.opening.prompts import WORDS


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    return parts_of(tmp_path_factory.mktemp("pictures")).training


def trainer(tmp_path, pairs, **changes) -> IntJudgeTrainer:
    model, processor = untrained()
    return IntJudgeTrainer(
        model,
        pairs,
        config(tmp_path, **changes),
        PROMPT,
        processing_class=processor,
        peft_config=adapters(4, dropout=0),
    )


def test_each_pair_is_read_in_both_orders_that_stand_together(pairs) -> None:
    rows = Rows(pairs, PROMPT, both_orders=True)
    dataset = rows.dataset()
    assert len(dataset) == 2 * len(pairs)
    first, second = dataset[0], dataset[1]
    assert first["completion"][0]["content"][0]["text"] == SAID[pairs[0].label]
    assert second["completion"][0]["content"][0]["text"] == SAID[pairs[0].swapped().label]
    assert first[SIGN] == -second[SIGN] and first[WEIGHT] == second[WEIGHT] == SIGNS[pairs[0].label][1]
    order = list(PairSampler(rows, 5))
    assert sorted(order) == list(range(2 * len(pairs)))
    assert all(b == a + 1 and a % 2 == 0 for a, b in zip(order[::2], order[1::2], strict=True))


def test_an_epoch_has_an_order_of_its_own_and_a_resumed_one_the_same(pairs) -> None:
    rows = Rows(pairs, PROMPT, both_orders=True)
    sampler, other = PairSampler(rows, 5), PairSampler(rows, 5)
    first = list(sampler)
    for each in (sampler, other):
        each.set_epoch(1)
    assert list(sampler) == list(other) != first


def test_the_labels_are_the_verdict_and_a_token_that_ends_it(tmp_path, pairs) -> None:
    made = trainer(tmp_path, pairs)
    batch = made.data_collator([made.rows[number] for number in range(4)])
    tokenizer = made.processing_class.tokenizer
    for row in range(4):
        words = SAID[(pairs[row // 2] if row % 2 == 0 else pairs[row // 2].swapped()).label]
        kept = batch["labels"][row][batch["labels"][row] != -100].tolist()
        assert kept[: len(words)] == tokenizer(words, add_special_tokens=False)["input_ids"]
        assert tokenizer.eos_token_id in kept
    assert not [name for name, _ in made.model.named_parameters() if "lora" in name and "visual" in name]


def test_a_tokenizer_that_ends_nothing_or_mixes_verdicts_is_refused(tmp_path, pairs) -> None:
    model, processor = untrained()
    settings = {"processing_class": processor, "peft_config": adapters(4)}
    with pytest.raises(WrongTypeError, match="must be an IntJudgeConfig"):
        IntJudgeTrainer(model, pairs, None, PROMPT, **settings)
    processor.tokenizer.eos_token = None
    with pytest.raises(TersorError, match="ends an answer"):
        IntJudgeTrainer(model, pairs, config(tmp_path), PROMPT, **settings)
    model, processor = untrained()
    settings["processing_class"] = processor
    processor.chat_template = processor.chat_template.partition("{% if add_generation_prompt")[0]
    with pytest.raises(TersorError, match="between what a judge is asked and its verdict"):
        IntJudgeTrainer(model, pairs, config(tmp_path), PROMPT, **settings)


def test_verdicts_that_begin_alike_are_refused(tmp_path, pairs, monkeypatch) -> None:
    model, processor = untrained()
    monkeypatch.setitem(WORDS, "A is better, much", "A")
    with pytest.raises(TersorError, match="cannot tell 'A is better' and 'A is better, much' apart"):
        IntJudgeTrainer(model, pairs, config(tmp_path), PROMPT, processing_class=processor)


def brute_force(made: IntJudgeTrainer, batch: dict) -> tuple[float, torch.Tensor]:
    """The library's own loss, and the margin of every row from its own unpadded forward."""
    inputs = {name: value for name, value in batch.items() if name not in (SIGN, WEIGHT)}
    with torch.no_grad():
        loss = made.model(**inputs).loss.item()
        logits = made.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    start = (inputs["labels"] != -100).int().argmax(1) - 1
    return loss, margin(logits, start, made.first)


def test_the_loss_is_the_libraries_and_the_extras_are_the_formulas(tmp_path, pairs) -> None:
    made = trainer(tmp_path, pairs)
    made.model.eval()
    batch = made.data_collator([made.rows[number] for number in range(6)])
    wanted, s = brute_force(made, batch)
    with torch.no_grad():
        assert made.compute_loss(made.model, dict(batch)).item() == pytest.approx(wanted, abs=1e-5)
        made.args.rank_weight, made.args.swap_weight = 0.5, 0.25
        rank = (batch[WEIGHT] * torch.nn.functional.softplus(-batch[SIGN] * s)).mean().item()
        swap = ((s[0::2] + s[1::2]) ** 2).mean().item()
        told = made.compute_loss(made.model, dict(batch)).item()
    assert told == pytest.approx(wanted + 0.5 * rank + 0.25 * swap, abs=1e-5)
    assert rank > 0.1 and swap > 0


def test_the_swap_loss_alone_makes_a_judge_even(tmp_path, pairs) -> None:
    def unevenness(made) -> float:
        batch = made.data_collator([made.rows[number] for number in range(8)])
        _, s = brute_force(made, batch)
        return (s[0::2] + s[1::2]).abs().mean().item()

    made = trainer(tmp_path, pairs[:4], swap_weight=10.0, max_steps=6, save_strategy="no")
    before = unevenness(made)
    made.train()
    made.model.eval()
    assert unevenness(made) < 0.5 * before


def test_training_raises_the_probability_of_what_was_said(tmp_path, pairs) -> None:
    """Padding, batches and prompts are those of the judge in use, so its own scores must move."""
    made = trainer(tmp_path, pairs[:2], max_steps=6, per_device_train_batch_size=4, save_strategy="no")
    judge = LocalJudge(made.model, made.processing_class, PROMPT, name="tiny")
    questions = [Question(pair.battle, 0, pair.instance, pair.first, pair.second) for pair in pairs[:2]]
    said = [list(WORDS).index(SAID[pair.label]) for pair in pairs[:2]]
    before = judge.scores(questions)[range(2), said].mean()
    made.model.train()
    made.train()
    judge.model.eval()
    assert judge.scores(questions)[range(2), said].mean() > before + 1
