"""Train a router on requests whose expert is known."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.bench.measure import seed_of
from tersor.bench.runs import OnProgress
from tersor.experts.router.config import KINDS, RouterConfig
from tersor.experts.router.kinds import EmbeddingScorer, EncoderScorer, LLMScorer, last_logits, load_backbone
from tersor.experts.router.routing import Router
from tersor.training.state import load_state, save_state

#: Peak rates where none is given; a head alone takes a far higher one than a whole model.
RATES = {"llm": 1e-4, "encoder": 5e-5, "embedding": 3e-2}
#: Steps between two states on disk and two lines of progress.
SAVE_EVERY = 50


@dataclass(frozen=True)
class Request:
    """A user's turn and the expert that it is for."""

    text: str
    expert: str
    right: Mapping[str, bool] | None = None
    """Whether each expert answers it right, by name, where that is known."""


@dataclass(frozen=True, kw_only=True)
class RouterTraining:
    """How a router is trained.

    Raises:
        ValueError: If a setting is out of range.
    """

    steps: int = 300
    batch: int = 32
    """Requests a step."""
    rate: float | None = None
    """Peak rate of AdamW, by default the kind's in `RATES`; it rises over a tenth of the steps, then falls to 0."""
    seed: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or (self.rate is not None and not 0 < self.rate < 1):
            raise TersorError(
                f"steps={self.steps} and batch={self.batch} must be at least 1, rate={self.rate} between 0 and 1"
            )


def read_requests(file: Path, experts: Sequence[str]) -> list[Request]:
    """Requests from a file with ``{"text": ..., "expert": ...}`` a line, and "right" by expert where it is known.

    Raises:
        ValueError: If a line, which is named, is not a request or is for an expert that is not in ``experts``.
    """
    if not file.is_file():
        raise TersorError(f"{file}: no such file")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            request = Request(row["text"], row["expert"], row.get("right"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TersorError(f'{file}:{number} must be {{"text": ..., "expert": ...}}') from None
        if not isinstance(request.text, str) or not request.text.strip():
            raise TersorError(f"{file}:{number} has no text")
        if request.expert not in experts:
            raise TersorError(f"{file}:{number} is for {request.expert!r}; the router's experts are {list(experts)}")
        if request.right is not None and set(request.right) != set(experts):
            raise TersorError(f'{file}:{number}: "right" must say true or false of each of {list(experts)}')
        found.append(request)
    if not found:
        raise TersorError(f"{file} holds no request")
    return found


def train_router(
    config: RouterConfig,
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    training: RouterTraining | None = None,
    *,
    state: Path | None = None,
    on_progress: OnProgress = lambda doing: None,
) -> Router:
    """A router of ``config.kind``; experts count alike, however many requests each has.

    Args:
        config: Kind, experts and limits of the router.
        model: As `load_backbone` gives it for the kind; trained in place, except for "embedding" (a head alone).
        tokenizer: The model's own.
        requests: What to train on; every expert needs some.
        training: Steps, batch, rate and seed.
        state: File that an interrupted training goes on from.
        on_progress: Told every `SAVE_EVERY` steps how far the training is.

    Raises:
        ValueError: If an expert has no requests, if the kind is "rules", which are written instead of trained, or if
            ``state`` belongs to another training.
    """
    if config.kind == "rules":
        raise TersorError(f"rules are written, not trained; kinds that are trained are {KINDS[:-1]}")
    training = training or RouterTraining()
    training = replace(training, rate=training.rate or RATES[config.kind])
    names = list(config.experts)
    by_expert = [[request.text for request in requests if request.expert == name] for name in names]
    if missing := [name for name, texts in zip(names, by_expert, strict=True) if not texts]:
        raise TersorError(f"there are no requests for {missing[0]!r}; each expert needs some")
    torch.manual_seed(training.seed)
    model.requires_grad_(config.kind != "embedding")
    scorer: LLMScorer | EncoderScorer | EmbeddingScorer
    if config.kind == "llm":
        scorer = LLMScorer(model, tokenizer, config.experts, config.max_tokens)
        trained, loss = model, _letter_loss(scorer)
    elif config.kind == "encoder":
        scorer = EncoderScorer(model, tokenizer, config.max_tokens)
        trained, loss = model, _label_loss(scorer)
    else:
        scorer = EmbeddingScorer(model, tokenizer, config.max_tokens, nn.Linear(model.config.hidden_size, len(names)))
        trained, loss = scorer.head, _head_loss(scorer, by_expert)
    plan = json.dumps([asdict(training), {**vars(config), "experts": dict(config.experts)}])
    _fit(trained, by_expert, loss, training, plan, state, on_progress)
    trained.eval().requires_grad_(False)
    return Router(config, scorer)


#: From texts, their experts, a generator for whatever is drawn, and the share of the training that is done, to a loss.
Loss = Callable[[list[str], list[int], random.Random, float], Tensor]
#: The shares of the training between which lists go from never to always shuffled.
SHUFFLING = (0.1, 0.4)


def _letter_loss(scorer: LLMScorer) -> Loss:
    def loss(texts: list[str], labels: list[int], rng: random.Random, done: float) -> Tensor:
        # To tell requests apart is easier than to find the line as well: a model that starts from nothing learns one
        # after the other.
        shuffled = (done - SHUFFLING[0]) / (SHUFFLING[1] - SHUFFLING[0])
        prompts, letters = [], []
        for text, label in zip(texts, labels, strict=True):
            order = list(range(len(scorer.experts)))
            if rng.random() < shuffled:
                rng.shuffle(order)
            prompts.append(scorer.prompt(text, order))
            letters.append(scorer.letters[order.index(label)])
        logits = last_logits(scorer.model, prompts)
        return F.cross_entropy(logits.float(), torch.tensor(letters, device=logits.device))

    return loss


def _label_loss(scorer: EncoderScorer) -> Loss:
    def loss(texts: list[str], labels: list[int], rng: random.Random, done: float) -> Tensor:
        logits = scorer.logits(texts)
        return F.cross_entropy(logits.float(), torch.tensor(labels, device=logits.device))

    return loss


def _head_loss(scorer: EmbeddingScorer, by_expert: list[list[str]]) -> Loss:
    texts = list(dict.fromkeys(text for group in by_expert for text in group))
    vectors = scorer.embed(texts).clone()
    place = {text: number for number, text in enumerate(texts)}

    def loss(texts: list[str], labels: list[int], rng: random.Random, done: float) -> Tensor:
        scores = scorer.head(vectors[[place[text] for text in texts]])
        return F.cross_entropy(scores, torch.tensor(labels))

    return loss


def _fit(
    model: nn.Module, by_expert: list[list[str]], loss: Loss, training: RouterTraining, plan: str, state: Path | None,
    on_progress: OnProgress,
) -> None:  # fmt: skip
    """AdamW; what is drawn for a step depends on seed and step alone, so that a run that goes on is the same run."""
    peak = training.rate or 0.0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=peak)
    start: int = load_state(state, plan=plan, model=model, optimizer=optimizer).get("step", 0)
    warmup = max(1, training.steps // 10)
    model.train()
    for step in range(start, training.steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / warmup, (training.steps - step) / training.steps)
        rng = random.Random(f"{training.seed} {step}")
        torch.manual_seed(seed_of(training.seed, step))  # of dropout, where a model has it
        labels = [rng.randrange(len(by_expert)) for _ in range(training.batch)]
        value = loss([rng.choice(by_expert[label]) for label in labels], labels, rng, step / training.steps)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            on_progress(f"step {step + 1} of {training.steps}: loss {float(value.detach()):.3f}")
            if state is not None:
                save_state(state, plan=plan, model=model, optimizer=optimizer, progress={"step": step + 1})


def train_folder(
    config: RouterConfig,
    model: Path,
    requests: Sequence[Request],
    training: RouterTraining,
    out: Path,
    *,
    on_progress: OnProgress,
) -> Router:
    """`train_router` from a checkpoint's folder into the router's; goes on where an earlier call was interrupted."""
    backbone, tokenizer = load_backbone(config.kind, model, len(config.experts))
    if config.max_tokens > (longest := getattr(backbone.config, "max_position_embeddings", config.max_tokens)):
        config = replace(config, max_tokens=longest)
    out.mkdir(parents=True, exist_ok=True)
    state = out / "training.pt"
    router = train_router(config, backbone, tokenizer, requests, training, state=state, on_progress=on_progress)
    router.save_pretrained(out)
    state.unlink(missing_ok=True)
    return router
