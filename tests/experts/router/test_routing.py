"""Routers of all kinds: what they answer, how they are trained and kept, and what is measured of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from tersor import zoo
from tersor.cli import run
from tersor.experts.router.evaluation import NGramScorer, calibration_error, evaluate
from tersor.experts.router.kinds import LLMScorer, RulesScorer, letter_tokens, load_backbone
from tersor.experts.router.routing import Router, RouterConfig, user_turns
from tersor.experts.router.training import Request, RouterTraining, read_requests, train_router

EXPERTS = {"math": "word problems", "code": "programs", "chat": "talk"}
RULES = {"math": [r"\d", "sum"], "code": ["def ", "python"], "chat": ["hello"]}
REQUESTS = [
    Request(f"{start} {word}", expert)
    for expert, words in {
        "math": ("12+3", "7-5"),
        "code": ("def f", "import"),
        "chat": ("hello", "how are you"),
    }.items()
    for word in words
    for start in ("please,", "now", "well:")
]
MODELS: dict[str, Any] = {
    "llm": LlamaForCausalLM,
    "encoder": LlamaForSequenceClassification,
    "embedding": LlamaModel,
}


def rules(**settings: Any) -> Router:
    return Router(RouterConfig(kind="rules", experts=EXPERTS, **settings), RulesScorer(RULES, list(EXPERTS)))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return zoo.load("tiny-lm")[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """An untrained model of each class with its tokenizer."""
    root = tmp_path_factory.mktemp("backbones")
    config = LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer), "pad_token_id": None, "initializer_range": 0.05})
    config.num_labels = len(EXPERTS)
    for kind, build in MODELS.items():
        torch.manual_seed(0)
        build(config).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return {kind: root / kind for kind in MODELS}


def trained(folders: dict[str, Path], kind: str, *, steps: int = 60, rate: float = 1e-2, **more: Any) -> Router:
    config = RouterConfig(kind=kind, experts=EXPERTS, max_tokens=160)
    return train_router(
        config, *load_backbone(kind, folders[kind], len(EXPERTS)), REQUESTS,
        RouterTraining(steps=steps, batch=12, rate=0.3 if kind == "embedding" else rate), **more,
    )  # fmt: skip


# ---- what a request is, and the policy ---------------------------------------------------------------------------


def test_the_last_user_turn_is_routed() -> None:
    talk = [
        {"role": "system", "content": "def "},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": [{"type": "text", "text": "what is 3+4?"}, {"type": "image_url", "image_url": {}}]},
    ]
    assert user_turns(talk) == ["hello", "what is 3+4?"]
    expert, prob, everyone = rules(sticky=False).route(talk)
    assert (expert, prob) == ("math", 1.0)
    assert everyone == {"math": 1.0, "code": 0.0, "chat": 0.0}
    for empty in ([], "  ", [{"role": "assistant", "content": "hi"}], [{"role": "user", "content": ""}]):
        with pytest.raises(ValueError, match="no user turn"):
            rules().route(empty)


def test_a_conversation_stays_with_its_first_expert() -> None:
    router = rules()
    first = [{"role": "user", "content": "hello"}]
    more = [*first, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "3+4"}]
    assert router.route(first).expert == "chat"
    assert router.route(more).expert == "chat"
    assert rules(sticky=False).route(more).expert == "math"
    assert router.route("3+4", conversation="a").expert == "math"
    assert router.route("hello", conversation="a").expert == "math"
    assert router.route("hello", conversation="b").expert == "chat"
    router.forget("a")
    assert router.route("hello", conversation="a").expert == "chat"


def test_a_conversation_is_forgotten_when_others_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.experts.router.routing.REMEMBERED", 2)
    router = rules()
    for name in ("a", "b"):
        router.route("hello", conversation=name)
    router.route("hello", conversation="a")
    router.route("hello", conversation="c")  # b was silent longest
    assert router.route("3+4", conversation="a").expert == "chat"
    assert router.route("3+4", conversation="b").expert == "math"


def test_below_the_threshold_the_fallback_answers() -> None:
    unsure = "def sum"  # a vote each
    assert rules().route(unsure).prob == 0.5
    assert rules(threshold=0.6).route(unsure).expert is None
    assert rules(threshold=0.6, fallback="chat").route(unsure).expert == "chat"
    assert rules(threshold=0.5).route(unsure).expert == "math"
    assert rules(threshold=0.4).route("nothing of all that").expert is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "magic"}, "router kind"),
        ({"experts": {"one": "alone"}}, "at least two"),
        ({"experts": {"../x": "a", "b": "b"}}, "plain name"),
        ({"experts": {"a": "", "b": "b"}}, "description"),
        ({"experts": {"a": "two\nlines", "b": "b"}}, "description"),
        ({"threshold": 1.5}, "threshold"),
        ({"fallback": "../x"}, "fallback"),
        ({"max_tokens": 2}, "max_tokens"),
    ],
)
def test_impossible_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterConfig(**{"kind": "rules", "experts": EXPERTS, **change})


def test_rules_must_fit() -> None:
    with pytest.raises(ValueError, match="rules are for"):
        RulesScorer({"math": ["x"]}, list(EXPERTS))
    with pytest.raises(ValueError, match="no regular expression"):
        RulesScorer({**RULES, "chat": ["("]}, list(EXPERTS))


# ---- letters ------------------------------------------------------------------------------------------------------


def test_letters_are_scored_after_each_prompt(folders: dict[str, Path]) -> None:
    """One padded pass gives what each prompt alone gives, and only the letters' logits count."""
    model, tokenizer = load_backbone("llm", folders["llm"], 3)
    scorer = LLMScorer(model, tokenizer, EXPERTS, 160)
    texts = ["add 1 and 2", "x", "a much longer request than the others"]
    found = scorer.probabilities(texts)
    letters = tokenizer.encode("ABC")
    for row, text in zip(found, texts, strict=True):
        prompt = tokenizer.encode(
            "Who answers this best?\nA. math: word problems\nB. code: programs\nC. chat: talk\n"
            f"Request: {text}\nAnswer:"
        )
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(row, logits[letters].softmax(-1))


def test_a_long_request_loses_its_start(folders: dict[str, Path]) -> None:
    model, tokenizer = load_backbone("llm", folders["llm"], 3)
    scorer = LLMScorer(model, tokenizer, EXPERTS, 120)
    ids = scorer.prompt("start " + "x" * 200 + " the end", [2, 0, 1])
    text = tokenizer.decode(ids)
    assert len(ids) == 120
    assert "A. chat: talk\nB. math: word problems\nC. code: programs\n" in text
    assert text.endswith("the end\nAnswer:")
    assert "start" not in text
    with pytest.raises(ValueError, match="max_tokens=40"):
        LLMScorer(model, tokenizer, EXPERTS, 40).prompt("x", [0, 1, 2])


def test_too_many_experts_for_letters(tokenizer: Any) -> None:
    assert letter_tokens(tokenizer, 26) == tokenizer.encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    with pytest.raises(ValueError, match="27 different letters"):
        letter_tokens(tokenizer, 27)


# ---- training, and folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encoder", "embedding"])
def test_training_learns_what_is_easy_and_comes_back_from_disk(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    router = trained(folders, kind)
    assert evaluate(router, REQUESTS).accuracy.value >= 0.9
    router.save_pretrained(tmp_path / "router")
    texts = [request.text for request in REQUESTS]
    torch.testing.assert_close(
        Router.from_pretrained(tmp_path / "router").scorer.probabilities(texts), router.scorer.probabilities(texts)
    )


def test_an_embedding_router_leaves_its_model_alone(folders: dict[str, Path]) -> None:
    before = load_backbone("embedding", folders["embedding"], 3)[0].state_dict()
    after = trained(folders, "embedding", steps=5).scorer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_letters_carry_no_meaning(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In training the list is shuffled for each request, and the letter asked for is that of the expert's line."""
    asked: list[tuple[str, int]] = []

    def logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
        asked.extend((tokenizer.decode(ids), row) for row, ids in enumerate(prompts))
        return model(torch.tensor([[1]])).logits[0] * 0 + torch.zeros(len(prompts), model.config.vocab_size)

    def wanted(logits: torch.Tensor, letters: torch.Tensor) -> torch.Tensor:
        experts.extend(
            text.split(f"\n{tokenizer.decode([letter])}. ")[1].split(":")[0]
            for (text, _), letter in zip(asked[-len(letters) :], letters.tolist(), strict=True)
        )
        return logits.sum()

    tokenizer = load_backbone("llm", folders["llm"], 3)[1]
    experts: list[str] = []
    monkeypatch.setattr("tersor.experts.router.training.last_logits", logits)
    monkeypatch.setattr("tersor.experts.router.training.F.cross_entropy", wanted)
    trained(folders, "llm", steps=3)
    requests = [text.split("Request: ")[1].removesuffix("\nAnswer:") for text, _ in asked]
    assert experts == [next(r.expert for r in REQUESTS if r.text == text) for text in requests]
    assert len({text.split("\n")[1] for text, _ in asked}) == len(EXPERTS)  # each expert stands first at times


@pytest.mark.parametrize("kind", ["llm", "encoder", "embedding"])
def test_an_interrupted_training_goes_on(
    folders: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.experts.router.training.SAVE_EVERY", 2)
    state = tmp_path / "training.pt"

    def interrupt(doing: str) -> None:
        if doing.startswith("step 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(folders, kind, steps=6, state=state, say=interrupt)
    assert state.is_file()
    said: list[str] = []
    resumed = trained(folders, kind, steps=6, state=state, say=said.append)
    assert [text.split(":")[0] for text in said] == ["step 4 of 6", "step 6 of 6"]
    whole = trained(folders, kind, steps=6)
    texts = [request.text for request in REQUESTS]
    torch.testing.assert_close(resumed.scorer.probabilities(texts), whole.scorer.probabilities(texts))
    with pytest.raises(ValueError, match="another training"):
        trained(folders, kind, steps=7, state=state)


def test_rules_come_back_from_disk(tmp_path: Path) -> None:
    rules(threshold=0.6, fallback="chat").save_pretrained(tmp_path)
    again = Router.from_pretrained(tmp_path)
    assert again.config == RouterConfig(kind="rules", experts=EXPERTS, threshold=0.6, fallback="chat")
    assert again.route("def sum").expert == "chat"


def test_broken_folders(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"no router\.json"):
        Router.from_pretrained(tmp_path)
    rules().save_pretrained(tmp_path)
    file = tmp_path / "router.json"
    values = json.loads(file.read_text())
    for change, message in (
        ({"format_version": 2}, "upgrade"),
        ({"format_version": 1, "colour": "red"}, "describes no router"),
        ({"format_version": 1, "kind": "encoder"}, r"no config\.json"),
    ):
        file.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            Router.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match="describes no router"):
        Router.from_pretrained(tmp_path)
    router = trained(folders, "embedding", steps=1)
    router.save_pretrained(tmp_path / "head")
    (tmp_path / "head" / "router_head.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="no head"):
        Router.from_pretrained(tmp_path / "head")


def test_a_classifier_of_other_labels(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="for 4 experts"):
        load_backbone("encoder", folders["encoder"], 4)


def test_every_expert_needs_requests(folders: dict[str, Path]) -> None:
    config = RouterConfig(kind="llm", experts={**EXPERTS, "art": "pictures"}, max_tokens=200)
    with pytest.raises(ValueError, match="no requests for 'art'"):
        train_router(config, *load_backbone("llm", folders["llm"], 4), REQUESTS)
    with pytest.raises(ValueError, match="not trained"):
        train_router(rules().config, None, None, REQUESTS)


# ---- what is measured --------------------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    # Range 0.9-1: confidence 0.95, half of two right. Range 0.6-0.7: confidence 0.65, right.
    probabilities = torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.65, 0.35]])
    assert calibration_error(probabilities, torch.tensor([0, 0, 0])) == pytest.approx(2 / 3 * 0.45 + 1 / 3 * 0.35)


def test_evaluation_by_hand() -> None:
    right = {"math": True, "code": False, "chat": True}
    requests = [
        Request("3+4", "math", right),
        Request("hello", "math", right | {"chat": False}),
        Request("def ", "code", dict.fromkeys(EXPERTS, True)),
        Request("hello", "chat", right | {"math": False}),
    ]
    found = evaluate(rules(), requests)
    assert found.accuracy.value == 0.75
    assert found.confusion == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert {name: share.value for name, share in found.recall.items()} == {"math": 0.5, "code": 1.0, "chat": 1.0}
    assert found.calibration_error == pytest.approx(0.25)
    assert 0 < found.seconds.low <= found.seconds.value
    end = found.end_task
    assert end is not None
    assert (end.routed.value, end.oracle.value, end.gap.value) == (0.75, 1.0, -0.25)
    assert (end.best_name, end.best_single.value) == ("math", 0.75)
    assert evaluate(rules(), [Request("3", "math")]).end_task is None


def test_the_cheap_alternative_learns() -> None:
    scorer = NGramScorer(list(EXPERTS)).fit(REQUESTS)
    router = Router(RouterConfig(kind="rules", experts=EXPERTS), scorer)
    assert evaluate(router, REQUESTS).accuracy.value == 1.0
    torch.testing.assert_close(scorer.features(["abab"]).norm(), torch.tensor(1.0))


# ---- command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "requests.jsonl"
    right = {name: name == "math" for name in EXPERTS}
    rows = [{"text": r.text, "expert": r.expert, "right": right} for r in REQUESTS]
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def named(experts: dict[str, str] = EXPERTS) -> list[str]:
    return [part for name, what in experts.items() for part in ("--expert", f"{name}={what}")]


def test_train_and_eval(folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "router"
    train = [
        "experts",
        "router",
        "train",
        "--kind",
        "embedding",
        "--model",
        str(folders["embedding"]),
        "--data",
        str(data),
    ]
    assert run([*train, *named(), "--out", str(out), "--steps", "60", "--rate", "0.3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training_accuracy"]["value"] > 0.9
    assert not (out / "training.pt").exists()
    measure = ["experts", "router", "eval", str(out), "--data", str(data), "--training-data", str(data)]
    assert run([*measure, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"router", "n-grams"}
    assert found["router"]["end_task"]["oracle"]["value"] == pytest.approx(1 / 3)
    assert run(measure) == 0
    assert "answered right" in capsys.readouterr().out


def test_rules_on_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "rules.json"
    file.write_text(json.dumps(RULES))
    train = ["experts", "router", "train", "--kind", "rules", "--data", str(data), "--out", str(tmp_path / "router")]
    assert run([*train, *named(), "--rules", str(file)]) == 0
    assert Router.from_pretrained(tmp_path / "router").route("python").expert == "code"
    capsys.readouterr()
    for change, message in (
        ([*named(), "--model", "m"], "needs --rules"),
        ([*named({"math": "a", "art": "b"}), "--rules", str(file)], "of each of"),
        (["--expert", "math", "--rules", str(file)], "NAME=DESCRIPTION"),
    ):
        assert run([*train, *change]) == 2
        assert message in capsys.readouterr().err
    file.write_text("[]")
    assert run([*train, *named(), "--rules", str(file)]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "must be"),
        ('{"text": "x"}', "must be"),
        ('{"text": " ", "expert": "math"}', "no text"),
        ('{"text": "x", "expert": "art"}', "for 'art'"),
        ('{"text": "x", "expert": "math", "right": {"math": true}}', "of each"),
        ("", "no request"),
    ],
)
def test_lines_that_are_no_requests(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_requests(file, list(EXPERTS))
    with pytest.raises(ValueError, match="no such file"):
        read_requests(tmp_path / "none", list(EXPERTS))
