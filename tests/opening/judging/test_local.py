"""A local judge's four scores, against one row at a time without padding or cache."""

from __future__ import annotations

import json

import pytest
import torch
from arena import fill
from PIL import Image
from tiny_judges import judge_parts

from tersor._errors import TersorError
from tersor.opening.judging.base import Question
from tersor.opening.judging.local import LocalJudge
from tersor.opening.judging.runner import run_judge
from tersor.opening.prompts import WORDS, JudgePrompt
from tersor.opening.records import Battle, Instance, Step

CLASSES = ["qwen2_vl", "qwen2_5_vl", "llava"]
PROMPT = JudgePrompt(system="Judge.", question="Which?", side=112)


@pytest.fixture(scope="module", params=CLASSES)
def parts(request):
    return judge_parts(request.param)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list[Question]:
    """Three questions with 0, 2 and 5 pictures, of different lengths and sizes."""
    folder, found = tmp_path_factory.mktemp("pictures"), []
    for number, pictures in enumerate((0, 2, 5)):
        steps = []
        for place in range(pictures):
            file = folder / f"{number}-{place}.png"
            Image.effect_noise((40 + 20 * place, 60), 90).convert("RGB").save(file)
            steps.append(Step(f"step {place}", file))
        instance = Instance(f"010100{number}", "1", "1", "1", "", "", (Step("Draw " + "it " * number),), ())
        first, second = tuple(steps[: pictures // 2]), (*steps[pictures // 2 :], Step("the end"))
        found.append(Question(Battle.of(instance.uid, "01.01", "x", "y"), 0, instance, first, second))
    return found


def brute_force(judge: LocalJudge, question: Question) -> torch.Tensor:
    """The log-likelihood of each verdict, alone, unpadded, without a cache."""
    encoded = judge._encode(question).inputs
    found = []
    for verdict in WORDS:
        ids = torch.tensor([judge.processor.tokenizer(verdict, add_special_tokens=False)["input_ids"]])
        count = ids.shape[1]
        whole = {name: value for name, value in encoded.items() if name not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, count))
        with torch.no_grad():
            given = torch.cat([encoded["input_ids"], ids], 1)
            logits = judge.model(input_ids=given, **whole, use_cache=False).logits
        steps = logits[0, -count - 1 : -1].log_softmax(-1)
        found.append(steps.gather(1, ids[0][:, None]).sum())
    return torch.stack(found)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padded_batch_scores_as_single_rows_do(parts, questions, padding) -> None:
    judge = LocalJudge(*parts, PROMPT, name="tiny", padding=padding)
    pictures = [sum(step.image is not None for step in (*each.first, *each.second)) for each in questions]
    assert pictures == [0, 2, 5]
    wanted = torch.stack([brute_force(judge, each) for each in questions])
    assert wanted.std() > 0.1
    torch.testing.assert_close(judge.scores(questions), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(judge.scores(questions[::-1]), wanted.flip(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(judge.scores(questions[1:2]), wanted[1:2], atol=1e-4, rtol=0)


def test_the_judge_looks_at_the_pictures(parts, questions, tmp_path) -> None:
    judge = LocalJudge(*parts, PROMPT, name="tiny")
    before = judge.scores(questions[1:2])
    Image.new("RGB", (60, 60), (0, 0, 255)).save(tmp_path / "blue.png")
    shown = Step(questions[1].second[0].text, tmp_path / "blue.png")
    changed = Question(
        questions[1].battle, 0, questions[1].instance, questions[1].first, (shown, questions[1].second[1])
    )
    assert (judge.scores([changed]) - before).abs().max() > 1e-4


def test_a_run_keeps_probabilities_and_says_their_mass(parts, store, mini_root) -> None:
    fill(store, mini_root, ["x", "y"], count=4)
    judge = LocalJudge(*parts, PROMPT, name="tiny", batch=3)
    outcome = run_judge(store, judge)
    assert outcome.decided == 4 and outcome.statuses == {"ok": 8}
    for row in store.raw("hf:tiny"):
        said = json.loads(row.text)
        scores = torch.tensor(list(said["log_probabilities"].values()))
        assert row.label == WORDS[max(said["log_probabilities"], key=said["log_probabilities"].get)]
        assert scores.logsumexp(0).item() == pytest.approx(said["log_mass"], abs=1e-3)
        chances = scores.softmax(0)
        assert row.probability == pytest.approx((chances[0] + chances[2]).item(), abs=1e-3)
    (remark,) = judge.remarks()
    assert "log of the probability of all four verdicts" in remark and "is none" in remark  # it is untrained


def test_a_battle_that_is_too_long_is_shrunk_and_then_given_up(parts, questions) -> None:
    judge = LocalJudge(*parts, JudgePrompt(system="Judge.", side=512), name="tiny")
    judge.most_tokens = 30
    assert judge._encode(questions[2]) is None
    replies = []
    judge.run(iter(questions), lambda question, reply: replies.append(reply))
    assert [each.status for each in replies] == ["too_large"] * 3


def test_a_checkpoint_is_a_judge(parts, questions, tmp_path) -> None:
    model, processor = parts
    model.save_pretrained(tmp_path / "judge")
    processor.save_pretrained(tmp_path / "judge")
    loaded = LocalJudge.from_pretrained(str(tmp_path / "judge"), PROMPT, device="cpu")
    wanted = LocalJudge(model, processor, PROMPT, name="tiny").scores(questions)
    torch.testing.assert_close(loaded.scores(questions), wanted, atol=1e-4, rtol=0)


def test_a_tokenizer_that_cannot_tell_verdicts_apart_is_refused() -> None:
    with pytest.raises(TersorError, match="cannot tell"):
        LocalJudge.from_pretrained("tiny-vlm")
    with pytest.raises(TersorError, match="reads no pictures"):
        LocalJudge.from_pretrained("tiny-lm")
