"""The benchmark's short cut, one recorded prefill for all caches, against really prefilling and generating."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tersor import zoo
from tersor._compat import with_cache
from tersor.kv.bench.contenders import FULL, bytes_at_half_precision, half_precision_dense, pick
from tersor.kv.bench.recall import Scores, answers_correct, recorded, score_continuation, score_recall
from tersor.kv.bench.tasks import recall_samples
from tersor.kv.tape import RECORDER, record, replay
from tersor.kv.zipcache import ZipCache

NAMES = ["ZipCache 4/2 r=0.6", "uniform 2-bit", "4/0 40% accumulated", "QuantizedCache quanto 2-bit"]


@pytest.fixture(scope="module")
def tiny():
    return zoo.load("tiny-lm")


def test_scoring_equals_generating(tiny) -> None:
    model, tokenizer = tiny
    samples = recall_samples("needle", n=6, prose=zoo.book(), seed=5, context_bytes=256)
    scores = score_recall(model, tokenizer.encode, samples, pick(NAMES[:1]), mode="agnostic")
    for index, sample in enumerate(samples):
        cache = ZipCache().cache(model.config)
        with ZipCache().on(model), torch.inference_mode():
            model(torch.tensor([tokenizer.encode(sample.context)]), **with_cache(cache))
            text = sample.context + sample.question + sample.answer_prefix
            ids = torch.tensor([tokenizer.encode(text)])
            output = model.generate(ids, **with_cache(cache), max_new_tokens=len(sample.answer), do_sample=False)
        right = tokenizer.decode(output[0, ids.shape[1] :]) == sample.answer
        assert scores[NAMES[0]].values[index] == float(right)


def test_full_cache_scores_are_those_of_one_forward(tiny) -> None:
    model, tokenizer = tiny
    book = zoo.book()
    scores = score_continuation(model, tokenizer.encode, book, pick([]), n=3, prefix=128, continuation=32)
    starts = __import__("numpy").random.default_rng([0, 77]).integers(0, len(book) - 160, size=3)
    for start, loss in zip(starts, scores[FULL].values, strict=True):
        ids = torch.tensor([tokenizer.encode(book[start : start + 160])])
        with torch.inference_mode():
            logits = model(ids).logits[0, 127:-1]
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[0, 128:])), abs=1e-4)


def test_wrong_answers_are_wrong(tiny) -> None:
    model, tokenizer = tiny
    prompt = torch.tensor([tokenizer.encode("\n[[AB=12")])
    with torch.inference_mode():
        best = model(prompt).logits[0, -1].argmax()
    for answer, right in ((best, True), (best - 1, False)):
        cache = pick([])[0].build(model.config)
        assert answers_correct(model, cache, prompt, answer.reshape(1, 1)) == [right]


def test_bytes_count_what_a_half_precision_model_would_hold(tiny) -> None:
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode(zoo.book()[:512])])
    dense = half_precision_dense(model.config, 1, 512)
    sizes = {}
    with RECORDER.on(model):
        tape = record(model, ids)
        for rival in pick(["uniform 2-bit", "evict to 20% recent", "QuantizedCache quanto 2-bit"]):
            sizes[rival.name] = bytes_at_half_precision(replay(tape, rival.build(model.config))) / dense
    assert sizes[FULL] == 1.0
    assert 2 / 16 < sizes["uniform 2-bit"] < 4 / 16
    assert 0.2 <= sizes["evict to 20% recent"] < 0.25
    # Two parameters of 16 bits for every 32 codes.
    assert 3 / 16 <= sizes["QuantizedCache quanto 2-bit"] < 6 / 16


def test_models_with_other_layers_are_not_compared() -> None:
    from tiny_models import build, prompt

    model = build("gemma3")
    with RECORDER.on(model), pytest.raises(NotImplementedError, match="full attention"):
        recorded(model, prompt(1, 40))


def test_scores_pool_and_compare() -> None:
    a, b = Scores([1.0, 1.0, 0.0, 1.0], 10, 40), Scores([1.0, 0.0, 0.0, 1.0], 20, 40)
    assert a.ratio == 4.0
    assert a.mean().value == 0.75
    assert a.against(b).value == 0.25
    a.add([0.0], 10, 40)
    assert a.ratio == 4.0
    assert len(a.values) == 5
    with pytest.raises(ValueError, match="choose from"):
        pick(["nothing"])


@pytest.mark.parametrize("mode", ["agnostic", "aware"])
def test_the_mode_says_whether_the_question_is_compressed_too(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded once is compressed, and what is asked afterwards is not."""
    from tersor.kv.bench import recall

    read: list[tuple[list[str], list[str]]] = []
    monkeypatch.setattr(recall, "token_ids", lambda texts, encode: list(texts))
    monkeypatch.setattr(recall, "recorded", lambda model, context: SimpleNamespace(tokens=1, context=context))
    monkeypatch.setattr(recall, "replay", lambda tape, cache: tape)
    monkeypatch.setattr(recall, "bytes_at_half_precision", lambda cache: 1)
    monkeypatch.setattr(recall, "half_precision_dense", lambda *_: 1)

    def answer(model: Any, tape: Any, prompt: list[str], answers: list[str]) -> list[float]:
        read.append((tape.context, prompt))
        return [1.0] * len(answers)

    monkeypatch.setattr(recall, "answers_correct", answer)
    samples = recall_samples("needle", n=2, prose=zoo.book(), seed=3)
    rival = SimpleNamespace(name="any", build=lambda config: None)
    model = zoo.load_model("tiny-recall")
    scores = recall.score_recall(model, list, samples, [rival], mode=mode)
    asked = [sample.question for sample in samples]
    (compressed, prompts) = read[0]
    assert [text.endswith(question) for text, question in zip(compressed, asked, strict=True)] == [mode == "aware"] * 2
    assert [text.startswith(question) for text, question in zip(prompts, asked, strict=True)] == [mode != "aware"] * 2
    assert scores["any"].values == [1.0, 1.0]
