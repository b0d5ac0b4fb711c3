"""Every field of the installed client has a class, and neutral values always pass."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat

from tersor.experts.server.errors import ApiError
from tersor.experts.server.fields import CHAT, COMPLETIONS, FieldTable
from tersor.experts.server.wire import ChatRequest, CompletionRequest

#: Fields of ours that the client sends in its extra body.
OURS = {"top_k"}
#: A value of each refused field that would change the answer.
CHANGES: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"}, "function_call": {"name": "f"}, "functions": [{"name": "f"}],
    "modalities": ["text", "audio"], "moderation": {"type": "auto"}, "response_format": {"type": "json_object"},
    "tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f"}}], "web_search_options": {},
    "best_of": 2, "suffix": "end",
}  # fmt: skip


def fields_of(params: Any) -> set[str]:
    """All that the client may send."""
    kinds = (params.CompletionCreateParamsNonStreaming, params.CompletionCreateParamsStreaming)
    return {name for kind in kinds for name in kind.__annotations__} | set(
        params.CompletionCreateParamsBase.__annotations__
    )


@pytest.mark.parametrize(
    ("table", "params", "model"), [(CHAT, chat, ChatRequest), (COMPLETIONS, completion, CompletionRequest)]
)
def test_every_field_of_the_client_is_in_one_class(table: FieldTable, params: Any, model: Any) -> None:
    """A new release of the client fails here, and not at a user's."""
    classes = [table.honoured, table.neutral, frozenset(table.refused)]
    assert sum(map(len, classes)) == len(frozenset().union(*classes)), "in one only"
    assert frozenset().union(*classes) == fields_of(params) | OURS
    assert table.honoured == set(model.model_fields), "what is honoured is read"


def check(table: FieldTable, lenient: bool = False, **body: Any) -> None:
    table.check(body, lenient=lenient, told=set())


@pytest.mark.parametrize("table", [CHAT, COMPLETIONS])
def test_null_and_neutral_values_pass_and_others_are_refused_by_name(table: FieldTable) -> None:
    for name, neutral in table.refused.items():
        for value in (None, *neutral):
            check(table, **{name: value})
        with pytest.raises(ApiError) as refused:
            check(table, **{name: CHANGES[name]})
        assert refused.value.failure.status == 400 and refused.value.failure.param == name
    for name in table.neutral:
        check(table, **{name: "anything"})


def test_a_value_is_neutral_in_its_own_type_alone() -> None:
    with pytest.raises(ApiError):
        check(COMPLETIONS, best_of=True)
    with pytest.raises(ApiError):
        check(COMPLETIONS, best_of=1.0)


def test_an_unknown_field_is_refused_unless_the_server_is_lenient() -> None:
    with pytest.raises(ApiError) as refused:
        check(CHAT, chat_template_kwargs={})
    assert refused.value.failure.param == "chat_template_kwargs"
    check(CHAT, lenient=True, chat_template_kwargs={})
    with pytest.raises(ApiError):
        check(CHAT, lenient=True, tools=CHANGES["tools"])
    check(CHAT, anything=None)


def test_a_field_without_effect_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    told: set[str] = set()
    with caplog.at_level("INFO"):
        for _ in range(3):
            CHAT.check({"user": "me", "verbosity": "low"}, lenient=False, told=told)
    assert len(caplog.records) == 2
