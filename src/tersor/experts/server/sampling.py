"""How one request draws its tokens, whatever else is in the batch.

    z' = z + bias - f count - p [count > 0]             the request's own, over the tokens that it has written
    token ~ softmax(top_p(top_k(z' / temperature)))     or the largest z' where the temperature is 0

Log probabilities are those of the model: softmax of z, before anything of the request touches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tersor._errors import UnsupportedError

#: Generation settings of an expert that say nothing about which token is drawn, or are the request's alone.
_ELSEWHERE = {
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache", "_from_model_config",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "cache_implementation", "cache_config", "return_legacy_cache", "disable_compile", "transformers_version",
}  # fmt: skip
_OWN = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
#: Settings whose value means that nothing is done.
_NEUTRAL: tuple[Any, ...] = (None, False, 0, 0.0, 1, 1.0, [], {}, "")

#: Least log probability: JSON has no infinity.
LEAST = -9999.0
#: Lower temperatures are this one, which draws the likeliest token as well: logits over them may be no numbers.
COLDEST = 1e-5


class NotFiniteError(RuntimeError):
    """The model computed numbers that are none."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request says of how its tokens are drawn.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: Tokens that may be drawn, the likeliest ones; 0 is all of them.
        top_p: The smallest set of tokens with this much probability may be drawn.
        min_p: Least probability, as a share of the likeliest token's.
        seed: Two requests of one seed and one prompt draw the same tokens; None draws anew.
        presence_penalty: Taken from the logit of each token that the answer has already.
        frequency_penalty: The same, for each time that it has it.
        repetition_penalty: Logits of tokens that prompt or answer has are divided by it, or multiplied below zero.
        logit_bias: Added to logits, by token.
        top_logprobs: Likeliest tokens whose log probabilities are wanted; None wants none, not even the drawn one's.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Picked:
    """One token of an answer.

    Args:
        token: Its id.
        logprob: Its log probability, None where nobody asked.
        top: The likeliest tokens and theirs, the likeliest first.
    """

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


def own_sampling(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Sampling` as an expert's own generation settings have them, as `generate` reads them.

    Raises:
        UnsupportedError: If a setting changes answers in a way that the server has not; it names it.
    """
    for key, value in settings.items():
        if key not in _ELSEWHERE and key not in _OWN and value not in _NEUTRAL:
            raise UnsupportedError(
                f"the generation settings of {name!r} have {key}={value!r}, which the server cannot do: take it out "
                "of generation_config.json"
            )
    found = {key: settings[key] for key in ("min_p", "repetition_penalty") if settings.get(key) is not None}
    if not settings.get("do_sample"):
        return {"repetition_penalty": found.get("repetition_penalty", 1.0)}
    given = {key: settings[key] for key in ("temperature", "top_k", "top_p") if settings.get(key) is not None}
    return {"temperature": 1.0, "top_k": 50, **found, **given}  # as the library's defaults are where it samples


class Sampler:
    """Draws the tokens of one answer, one after the other.

    Args:
        sampling: What the request says.
        prompt: Ids of its prompt.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._seen = list(prompt) if sampling.repetition_penalty != 1 else []
        self._counts: dict[int, int] = {}
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**63)
        self._warpers = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if sampling.temperature > 0:
            if sampling.temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(max(COLDEST, float(sampling.temperature))))
            if sampling.top_k:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))
            if sampling.min_p:
                self._warpers.append(MinPLogitsWarper(float(sampling.min_p)))

    def pick(self, logits: Tensor) -> Picked:
        """The next token, from the model's own logits ``[vocabulary]`` (float32), which stay as they are.

        Raises:
            NotFiniteError: If a logit is no number; minus infinity is one, as long as not all are.
        """
        if not torch.isfinite(logits.amax()):  # of logits with a NaN the largest is one
            raise NotFiniteError("the model computed numbers that are none")
        scores = self._warpers(torch.tensor([self._seen], device=logits.device), self._moved(logits)[None])[0]
        if self.sampling.temperature > 0:
            chances = scores.softmax(-1).cpu()
            token = int(torch.multinomial(chances, 1, generator=self._generator))
        else:
            token = int(scores.argmax())
        self._counts[token] = self._counts.get(token, 0) + 1
        if self.sampling.repetition_penalty != 1:
            self._seen.append(token)
        if self.sampling.top_logprobs is None:
            return Picked(token)
        logprobs = logits.log_softmax(-1).clamp(min=LEAST)
        values, tokens = logprobs.topk(min(self.sampling.top_logprobs, len(logprobs)))
        return Picked(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))

    def _moved(self, logits: Tensor) -> Tensor:
        """Logits with the request's bias and penalties."""
        own = self.sampling
        added = dict(own.logit_bias)
        if own.presence_penalty or own.frequency_penalty:
            for token, count in self._counts.items():
                added[token] = added.get(token, 0.0) - own.presence_penalty - own.frequency_penalty * count
        if not added:
            return logits
        moved = logits.clone()
        moved[list(added)] += torch.tensor(list(added.values()), device=logits.device)
        return moved
