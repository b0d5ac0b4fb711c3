"""How well the router of tiny-experts sends requests in words to the expert that can answer them."""

from __future__ import annotations

from collections.abc import Sequence

from tersor import zoo
from tersor.experts.bench.quality import MODEL, Family, exact
from tersor.experts.bench.requests import LabelledRequest, draw_requests
from tersor.experts.router.evaluation import Evaluation, NGramScorer, evaluate
from tersor.experts.router.routing import Router
from tersor.experts.router.training import Request

#: Requests that routers are trained on, and the seed that draws them.
TRAINING, TRAINING_SEED = 8000, 3
ENCODER, NGRAMS = "encoder", "n-grams"


def training_requests(n: int = TRAINING) -> list[Request]:
    """What a router is trained on: seen templates, and words and numbers that models may be trained on."""
    rows = draw_requests(n, seed=TRAINING_SEED, unseen=False, held_out=False)
    return [Request(row.text, row.skill) for row in rows]


def evaluation_requests(family: Family, rows: Sequence[LabelledRequest]) -> list[Request]:
    """Requests with what each expert answers to the prompt that they stand for."""
    right = {skill: exact(expert, [row.example for row in rows]) for skill, expert in family.experts.items()}
    return [
        Request(row.text, row.skill, {skill: hits[place] for skill, hits in right.items()})
        for place, row in enumerate(rows)
    ]


def route_requests(*, unseen: bool, n: int, seed: int) -> dict[str, Evaluation]:
    """The router of the zoo, and the n-gram baseline trained on the same requests, on ``n`` held-out ones."""
    router = Router.from_pretrained(zoo.path(MODEL) / "router")
    requests = evaluation_requests(Family.load(), draw_requests(n, seed=seed, unseen=unseen, held_out=True))
    cheap = Router(router.config, NGramScorer(list(router.config.experts)).fit(training_requests()))
    return {ENCODER: evaluate(router, requests), NGRAMS: evaluate(cheap, requests)}
