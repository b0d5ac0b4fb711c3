"""Every field of OpenAI's two requests, in one of three classes.

Honoured: it does what it says. Neutral: it cannot change the text, so it is accepted. Refused: it would change the
answer and cannot be done here, so a value other than its neutral ones is an error that names it. Null is always
accepted. A field that is in no class is refused, unless the server is lenient.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tersor.experts.server.errors import refuse

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FieldTable:
    """The fields of one endpoint.

    Args:
        honoured: Those that `wire` reads.
        neutral: Those that are accepted whatever they say.
        refused: Those that are refused, with the values that change nothing.
    """

    honoured: frozenset[str]
    neutral: frozenset[str]
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def check(self, body: Mapping[str, Any], *, lenient: bool, told: set[str]) -> None:
        """Refuse what cannot be done.

        Args:
            body: Of the request.
            lenient: Whether unknown fields are accepted.
            told: Fields that the log has told of already; others are added.

        Raises:
            ApiError: 400, with the field's name.
        """
        for name, value in body.items():
            if value is None or name in self.honoured:
                continue
            if name in self.refused:
                if not any(value == each and type(value) is type(each) for each in self.refused[name]):
                    raise refuse(f"{name} is not supported here: leave it out", name, code="unsupported_parameter")
            elif name not in self.neutral and not lenient:
                message = f"{name} is not known here: leave it out, or start the server with --lenient"
                raise refuse(message, name, code="unknown_parameter")
            if name not in told:
                told.add(name)
                LOG.info("the field %r of requests is accepted and has no effect", name)


_SAMPLING = frozenset({
    "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "model", "n", "presence_penalty", "seed", "stop",
    "stream", "stream_options", "temperature", "top_p", "top_k",
})  # fmt: skip

CHAT = FieldTable(
    honoured=_SAMPLING | {"messages", "max_completion_tokens", "top_logprobs"},
    neutral=frozenset({
        "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier", "store", "user", "verbosity",
    }),
    refused={
        "audio": (), "function_call": ("none", "auto"), "functions": ([],), "modalities": (["text"], []),
        "moderation": (), "response_format": ({"type": "text"},), "tool_choice": ("none", "auto"), "tools": ([],),
        "web_search_options": (),
    },
)  # fmt: skip

COMPLETIONS = FieldTable(
    honoured=_SAMPLING | {"echo", "prompt"},
    neutral=frozenset({"user"}),
    refused={"best_of": (1,), "suffix": ("",)},
)
