"""Judges by their text: ``endpoint:MODEL``, ``hf:CHECKPOINT`` or ``scripted:NAME``."""

from __future__ import annotations

from dataclasses import dataclass

from tersor._errors import TersorError
from tersor.opening.judging.base import Judge
from tersor.opening.judging.endpoint import EndpointJudge
from tersor.opening.judging.scripted import ScriptedJudge
from tersor.opening.prompts import JudgePrompt


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """What the kinds of judges take; each uses its own.

    Args:
        prompt: What is shown; a trained judge is shown its own, unless this is another than the default.
        base_url: Of an endpoint.
        key_env: Environment variable with its key.
        concurrency: Open requests at most.
        max_tokens: Of a reply.
        logprobs: Ask an endpoint for probabilities.
        device: Of a checkpoint.
        batch: Questions that a checkpoint reads at once.
    """

    prompt: JudgePrompt
    base_url: str | None = None
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    max_tokens: int | None = None
    logprobs: bool = False
    device: str = "auto"
    batch: int = 4


def judge_of(text: str, options: JudgeOptions) -> Judge:
    """The judge that a text names.

    Raises:
        TersorError: If it names none, or an option that it needs is missing.
    """
    kind, _, name = text.partition(":")
    if kind == "scripted":
        return ScriptedJudge.from_text(name)
    if kind == "endpoint":
        if options.base_url is None:
            raise TersorError(f"--judge {text} needs --base-url, such as http://127.0.0.1:8000/v1")
        return EndpointJudge(
            options.base_url, name, options.prompt, key_env=options.key_env, concurrency=options.concurrency,
            max_tokens=options.max_tokens, logprobs=options.logprobs,
        )  # fmt: skip
    if kind == "hf" and name:
        from tersor.opening.judging.local import LocalJudge

        own = None if options.prompt == JudgePrompt() else options.prompt
        return LocalJudge.from_pretrained(name, own, device=options.device, batch=options.batch)
    raise TersorError(f"--judge {text!r} must be endpoint:MODEL, hf:CHECKPOINT or scripted:NAME")
