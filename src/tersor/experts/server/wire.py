"""Requests in OpenAI's format, read strictly: what a field may hold, and what it means for the answer."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, ValidationError

from tersor.experts.server.errors import refuse
from tersor.experts.server.fields import CHAT, COMPLETIONS, FieldTable

_Number = Annotated[float, AllowInfNan(False)]
_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
_ROLES = ("system", "developer", "user", "assistant")


class StreamOptions(BaseModel):
    """What a stream has beside the answer."""

    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None


class Common(BaseModel):
    """Fields of both requests; what is not given is as the expert's own generation settings say."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: Annotated[_Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    top_k: int | None = Field(None, ge=-1)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: _Text | Annotated[list[_Text], Field(max_length=4)] | None = None
    presence_penalty: Annotated[_Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[_Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[_Number, Field(ge=-100, le=100)]] | None = None

    @property
    def stops(self) -> list[str]:
        """The strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self) -> dict[str, Any]:
        """Fields of `Sampling` that the request gives."""
        names = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty")
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        if found.get("top_k") == -1:
            found["top_k"] = 0
        bias = {key: value for key, value in (self.logit_bias or {}).items() if value}
        for key in bias:
            if not (key.isascii() and key.isdigit()):
                raise refuse(f"logit_bias has {key!r}, which is no token id", "logit_bias")
        return {**found, "logit_bias": {int(key): value for key, value in bias.items()}}


class CompletionRequest(Common):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | _Ids | Annotated[list[_Ids], Field(min_length=1)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[Any]:
        """Each prompt, all of them texts or all of them token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)

    def read_by_router(self) -> str | None:
        """What a router reads: the first prompt, where it is a text."""
        first = self.prompts[0]
        return first if isinstance(first, str) else None


class ChatRequest(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def read_by_router(self) -> list[dict[str, Any]]:
        """What a router reads; raises as `turns` does."""
        return self.turns()

    def turns(self) -> list[dict[str, Any]]:
        """The conversation, each content one text; other keys of a message go to the chat template as they are.

        Raises:
            ApiError: If a message is of another kind, or has parts that are no text.
        """
        turns = []
        for place, message in enumerate(self.messages):
            at = f"messages[{place}]"
            role = message.get("role")
            if role not in _ROLES:
                raise refuse(f"{at}.role {role!r} is not possible; choose one of {_ROLES}", f"{at}.role")
            for key in ("tool_calls", "function_call", "audio"):
                if message.get(key):
                    raise refuse(f"{at}.{key} is not supported here: leave it out", f"{at}.{key}")
            turn = {key: value for key, value in message.items() if value is not None}
            turns.append({**turn, "role": role, "content": _content(message.get("content"), f"{at}.content")})
        return turns


def _content(content: Any, at: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise refuse(f"{at} must be a text, or parts of the type 'text'", at)
    return "".join(map(str, texts))


def read_body(raw: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ApiError: 400, if it is none.
    """
    try:
        body = json.loads(raw)
        if b"\\ud" in raw.lower():  # half of a pair of surrogates is no text
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise refuse(f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise refuse("the body must be a JSON object", code="invalid_json")
    return body


def read_request(
    kind: type[ChatRequest] | type[CompletionRequest], raw: bytes, *, lenient: bool, told: set[str]
) -> ChatRequest | CompletionRequest:
    """The request of a body.

    Raises:
        ApiError: 400, naming the field that is wrong or cannot be done.
    """
    body = read_body(raw)
    table: FieldTable = CHAT if kind is ChatRequest else COMPLETIONS
    table.check(body, lenient=lenient, told=told)
    try:
        found = kind.model_validate({key: value for key, value in body.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else None
        raise refuse(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", name) from None
    except RecursionError:
        raise refuse("the body is nested too deeply", code="invalid_json") from None
    if isinstance(found, ChatRequest) and found.top_logprobs is not None and not found.logprobs:
        raise refuse("top_logprobs needs logprobs=true", "top_logprobs")
    if found.stream_options is not None and not found.stream:
        raise refuse("stream_options needs stream=true", "stream_options")
    if isinstance(found, CompletionRequest) and found.echo and found.logprobs is not None:
        raise refuse("logprobs of a prompt are not supported: leave out echo or logprobs", "logprobs")
    return found
