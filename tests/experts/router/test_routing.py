"""Which request is routed, conversations that stay with their expert, and the fallback."""

from __future__ import annotations

import pytest
from router_models import rules

from tersor.experts.router.routing import user_turns


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


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]


def test_conversations_that_begin_alike_do_not_stay_together() -> None:
    router = rules()
    assert router.route(talk("hello")).expert == "chat"
    assert router.route(talk("hello", "hi", "3+4")).expert == "chat"  # goes on with it
    assert router.route(talk("hello", "good day", "3+4")).expert == "math"  # another one, whose first request this is
    assert router.route(talk("hello", "good day", "3+4", "7", "hello")).expert == "math"
    assert router.route(talk("hello", "hi", "3+4", "7", "9+1")).expert == "chat"
    system = [{"role": "system", "content": "be brief"}]
    assert router.route([*system, *talk("hello", "hi", "3+4")]).expert == "math"


def test_the_same_request_again_gets_the_same_expert() -> None:
    router = rules()
    router.route(talk("hello"))
    assert [router.route(talk("hello", "hi", "3+4")).expert for _ in range(3)] == ["chat"] * 3
    assert router.route(talk("hello", "hi", "3+4", "7", "9+1")).expert == "chat"


def test_as_many_conversations_as_were_begun_alike_go_on() -> None:
    router = rules()
    for _ in range(2):
        router.route(talk("hello"))
    found = [router.route(talk("hello", answer, "3+4")).expert for answer in ("hi", "good day", "what?")]
    assert found == ["chat", "chat", "math"]


def test_an_id_holds_whatever_the_turns_say() -> None:
    router = rules()
    assert router.route(talk("hello"), conversation="a").expert == "chat"
    assert router.route(talk("3+4"), conversation="b").expert == "math"
    assert router.route(talk("other", "words", "3+4"), conversation="a").expert == "chat"
    assert router.route(talk("hello", "hi", "3+4")).expert == "math"  # no id: not the one of "a"


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
