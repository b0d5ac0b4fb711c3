"""How good a router is: right experts, how sure it may be, what it costs, and what its mistakes cost in answers."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.bench.measure import Estimate, bootstrap_difference, bootstrap_interval, wilson_interval
from tersor.experts.router.routing import Router
from tersor.experts.router.training import Request

#: Equal ranges of confidence that calibration is judged in.
BINS = 10
#: Requests that are timed, one at a time.
TIMED = 50


@dataclass(frozen=True)
class EndTask:
    """Shares of requests that are answered right."""

    routed: Estimate
    oracle: Estimate
    """By the best choice."""
    best_single: Estimate
    """By the best single expert."""
    best_name: str
    gap: Estimate
    """Routed less oracle, request by request."""


@dataclass(frozen=True)
class Evaluation:
    """What is measured of a router."""

    n: int
    accuracy: Estimate
    recall: dict[str, Estimate]
    """Share of each expert's requests that reach it."""
    confusion: list[list[int]]
    """Counts, true expert by likeliest one, in the order of the router's experts."""
    calibration_error: float
    """Of probabilities, in `BINS` ranges (Guo et al. 2017, equation 3)."""
    seconds: Estimate
    """A request, one at a time, with quartiles."""
    end_task: EndTask | None
    """Where requests say which experts answer them right."""


def evaluate(router: Router, requests: Sequence[Request]) -> Evaluation:
    """Routes each request by itself, as the first of a conversation.

    Raises:
        ValueError: If there is no request.
    """
    if not requests:
        raise TersorError("there are no requests to evaluate the router on")
    names = list(router.config.experts)
    probabilities = router.scorer.probabilities([request.text for request in requests])
    true = torch.tensor([names.index(request.expert) for request in requests])
    guess = probabilities.argmax(1)
    confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
    confusion.index_put_((true, guess), torch.ones_like(true), accumulate=True)
    recall = {
        name: wilson_interval(int(confusion[i, i]), int(confusion[i].sum()))
        for i, name in enumerate(names)
        if confusion[i].any()
    }
    return Evaluation(
        n=len(requests),
        accuracy=wilson_interval(int((true == guess).sum()), len(requests)),
        recall=recall,
        confusion=confusion.tolist(),
        calibration_error=calibration_error(probabilities, true),
        seconds=_latency(router, requests),
        end_task=_end_task(router, requests),
    )


def calibration_error(probabilities: Tensor, true: Tensor) -> float:
    """Expected gap between confidence and accuracy: ``sum_b n_b / n |accuracy_b - confidence_b|`` over `BINS` ranges.

    Args:
        probabilities: ``[n, experts]``.
        true: int64 ``[n]``.
    """
    confidence, guess = probabilities.max(1)
    place = (confidence * BINS).long().clamp_max(BINS - 1)
    error = 0.0
    for number in range(BINS):
        inside = place == number
        if inside.any():
            gap = (guess[inside] == true[inside]).float().mean() - confidence[inside].mean()
            error += float(inside.float().mean() * gap.abs())
    return error


def _latency(router: Router, requests: Sequence[Request]) -> Estimate:
    seconds = []
    for request in [requests[0], *requests[:TIMED]]:
        start = time.perf_counter()
        router.scorer.probabilities([request.text])
        seconds.append(time.perf_counter() - start)
    low, middle, high = torch.tensor(seconds[1:], dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    ).tolist()  # fmt: skip
    return Estimate(middle, low, high, "quartiles")


def _end_task(router: Router, requests: Sequence[Request]) -> EndTask | None:
    known = [request for request in requests if request.right is not None]
    if not known:
        return None
    routed, oracle = [], []
    single: dict[str, list[float]] = {name: [] for name in router.config.experts}
    for request, route in zip(known, router.route_all([request.text for request in known]), strict=True):
        assert request.right is not None  # as chosen above
        # What the base would answer is not known, so that a fallback to it counts as wrong.
        routed.append(float(request.right.get(route.expert or "", False)))
        oracle.append(float(request.right[request.expert]))
        for name, answers in single.items():
            answers.append(float(request.right[name]))
    best = max(single, key=lambda name: sum(single[name]))
    return EndTask(
        bootstrap_interval(routed), bootstrap_interval(oracle), bootstrap_interval(single[best]), best,
        bootstrap_difference(routed, oracle),
    )  # fmt: skip


class NGramScorer:
    """The cheap alternative to compare with: counts of character n-grams and a linear classifier.

    N-grams of 1 to ``longest`` characters are hashed into ``width`` counts, which are scaled to length 1.
    """

    def __init__(self, experts: Sequence[str], *, longest: int = 4, width: int = 2**14) -> None:
        self.experts, self.longest, self.width = list(experts), longest, width
        self.head = nn.Linear(width, len(experts))

    def features(self, texts: Sequence[str]) -> Tensor:
        """Float32 ``[texts, width]``."""
        counts = torch.zeros(len(texts), self.width)
        for row, text in enumerate(texts):
            grams = [
                zlib.crc32(text[start : start + size].encode()) % self.width
                for size in range(1, self.longest + 1)
                for start in range(len(text) - size + 1)
            ]
            counts[row] += torch.bincount(torch.tensor(grams, dtype=torch.int64), minlength=self.width)
        return F.normalize(counts.sqrt(), dim=-1)

    def fit(self, requests: Sequence[Request], *, passes: int = 20, rate: float = 0.05, seed: int = 1) -> NGramScorer:
        """Train on requests in batches of 64; returns itself."""
        features = self.features([request.text for request in requests])
        labels = torch.tensor([self.experts.index(request.expert) for request in requests])
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=rate, weight_decay=1e-3)
        rng = random.Random(seed)
        for _ in range(passes):
            for rows in torch.split(torch.tensor(rng.sample(range(len(labels)), len(labels))), 64):
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(self.head(features[rows]), labels[rows]))
                optimizer.step()
        return self

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """As `router.Scorer.probabilities`."""
        scores: Tensor = self.head(self.features(texts))
        return scores.softmax(-1)
