"""Sparse prefills on tiny-vlm: two questions in a row about a picture, from what the first one left in the cache.

The first question stands at the end of the prompt, so ZipVL's choice of tokens may depend on it. The second is asked of
the cache: a policy that evicts was not told about it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from tersor._compat import with_cache
from tersor.bench.measure import Estimate, bootstrap_difference, bootstrap_interval, storage_bytes
from tersor.bench.runs import Finished, OnProgress
from tersor.kv.bench.peers.sparse import fastv, fixed_share, random_share
from tersor.kv.bench.tiles import KINDS, Picture, Question, samples
from tersor.kv.method import KVMethod
from tersor.kv.prefill.sparsity import SparsityStats
from tersor.kv.selection.mass import MassSelection
from tersor.kv.zipvl import ZipVL

BATCH = 32
DENSE = "dense"
TAUS = (0.99, 0.975, 0.96, 0.94, 0.9, 0.8, 0.6)
#: Tokens of a prompt around the picture: <bos> <|vision_start|>, and <|vision_end|> with the two words of a question.
TEXT_BEFORE, TEXT_AFTER = 2, 3
#: Beside the paper's settings: a dense first layer, so that no later one meets a token that it left out; and probes in
#: the question alone, since the paper's 64 last rows are the picture's when a question has two words.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    ", layer 0 dense": {"skip_layers": (0,)},
    ", question's rows": {"probe_recent": TEXT_AFTER, "probe_random": 0},
}


@dataclass(frozen=True)
class Task:
    """A picture and two questions about it."""

    picture: Picture
    first: Question
    second: Question


@dataclass
class Outcome:
    """One contender: right answers by task, and what it kept.

    Args:
        first: 1.0 where the first question was answered right, 0.0 elsewhere.
        second: The same for the second question.
        kinds: Kind of each first question.
        needed: Tiles that it is about.
        ratios: Share of tokens in attention.
        visual: Share of visual tokens in attention.
        per_layer: Sums of the share over tasks, by layer.
        mass: Sum of the captured attention over tasks.
        flops: Sum of the operations saved over tasks.
        kv_bytes: Bytes of all caches.
        dense_bytes: 16 bits for every number of theirs.
    """

    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    needed: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    visual: list[float] = field(default_factory=list)
    per_layer: list[float] = field(default_factory=list)
    mass: float = 0.0
    flops: float = 0.0
    kv_bytes: int = 0
    dense_bytes: int = 0

    @property
    def ratio(self) -> float:
        """Mean share of tokens that take part in attention."""
        return float(np.mean(self.ratios))

    def layer_ratios(self) -> list[float]:
        """The same by layer."""
        return [each / len(self.first) for each in self.per_layer]

    def of_kind(self, kind: str) -> list[float]:
        """First answers to questions of ``kind``."""
        return [right for right, own in zip(self.first, self.kinds, strict=True) if own == kind]

    def ratios_of(self, kind: str, needed: int | None = None) -> list[float]:
        """Token ratios of questions of ``kind``, and about ``needed`` tiles if that is given."""
        told = zip(self.ratios, self.kinds, self.needed, strict=True)
        return [ratio for ratio, own, tiles in told if own == kind and needed in (None, tiles)]

    def add(self, stats: SparsityStats | None, rows: int, layers: int) -> None:
        """Count one batch; None is a dense one."""
        shares = (1.0,) * rows if stats is None else stats.per_row
        by_layer = (1.0,) * layers if stats is None else stats.per_layer
        self.ratios += shares
        self.visual += [1.0 if stats is None or stats.visual_ratio is None else stats.visual_ratio] * rows
        sums = self.per_layer or [0.0] * layers
        self.per_layer = [held + rows * share for held, share in zip(sums, by_layer, strict=True)]
        self.mass += rows * (1.0 if stats is None else stats.captured_mass)
        self.flops += rows * (0.0 if stats is None else stats.attn_flops_reduction_exact)


def tasks(n: int, *, seed: int, grid: int = 16, tiles: int = 4, kinds: Sequence[str] = KINDS) -> list[Task]:
    """``n`` tasks for each kind of first question; the second is about another colour, of either kind."""
    made = []
    for kind in kinds:
        rng = np.random.default_rng([seed, 7, KINDS.index(kind)])
        for shown, first in samples(n, kind=kind, seed=seed, grid=grid, tiles=tiles):
            asked = first.text.split()[1]
            able = [(k, c) for k in KINDS for c in shown.colours(k) if c != asked and shown.keyed(c)]
            able = able or [("count", c) for c in shown.colours("count") if c != asked]
            second = shown.ask(*able[int(rng.integers(len(able)))])
            made.append(Task(shown, first, second))
    return made


@torch.no_grad()
def run_method(
    model: PreTrainedModel, processor: Any, drawn: Sequence[Task], choose: Callable[[int], KVMethod] | None
) -> Outcome:
    """Both answers of every task.

    ``choose`` gives the method for a batch of tasks by its number, so that random choices differ between batches; None
    is the dense model with the library's own cache.
    """
    outcome = Outcome(kinds=[task.first.kind for task in drawn], needed=[len(task.first.relevant) for task in drawn])
    layers = model.config.get_text_config().num_hidden_layers
    for start in range(0, len(drawn), BATCH):
        part = drawn[start : start + BATCH]
        inputs = prompt(processor, part)
        follow = processor.tokenizer([f"{t.first.answer} <eos> {t.second.text}" for t in part], return_tensors="pt")
        if choose is None:
            cache: Any = DynamicCache(config=model.config)
            first, second = _two_turns(model, inputs, follow["input_ids"], cache)
            outcome.add(None, len(part), layers)
            held = [(layer.keys, layer.values) for layer in cache.layers]
            outcome.kv_bytes += storage_bytes(held)
            outcome.dense_bytes += sum(2 * (keys.numel() + values.numel()) for keys, values in held)
        else:
            method = choose(start // BATCH)
            with method.on(model) as session:
                cache = method.cache(model.config)
                first = model(**inputs, **with_cache(cache), logits_to_keep=1).logits[:, -1].argmax(-1)
                stats = session.stats
                outcome.add(stats, len(part), layers)
                outcome.kv_bytes += stats.kv_bytes
                outcome.dense_bytes += stats.kv_dense_bytes
                second = _next_turn(model, follow["input_ids"], cache)
        for said, wanted, right in (
            (first, [t.first.answer for t in part], outcome.first),
            (second, [t.second.answer for t in part], outcome.second),
        ):
            words = processor.tokenizer.convert_ids_to_tokens(said.tolist())
            right += [float(word == answer) for word, answer in zip(words, wanted, strict=True)]
    return outcome


def prompt(processor: Any, part: Sequence[Task]) -> dict[str, Tensor]:
    """What the model is given for the first question of each task."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.first.text}]}]
        )
        for task in part
    ]
    made: dict[str, Tensor] = dict(
        processor(text=texts, images=[task.picture.pixels for task in part], return_tensors="pt")
    )
    return made


def _two_turns(model: PreTrainedModel, inputs: dict[str, Tensor], follow: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
    first = model(**inputs, **with_cache(cache), logits_to_keep=1).logits[:, -1].argmax(-1)
    return first, _next_turn(model, follow, cache)


def _next_turn(model: PreTrainedModel, follow: Tensor, cache: Any) -> Tensor:
    """The answer after ``follow``, read on top of what the cache holds of the prompt; no row is padded."""
    said: Tensor = model(input_ids=follow, **with_cache(cache), logits_to_keep=1).logits[:, -1].argmax(-1)
    return said


def run_all(
    model: PreTrainedModel,
    processor: Any,
    drawn: Sequence[Task],
    *,
    taus: Sequence[float] = TAUS,
    seed: int = 0,
    on_progress: OnProgress = lambda name: None,
    progress: Path | None = None,
) -> dict[str, Outcome]:
    """Dense, ZipVL at every ``tau``, and simpler choices at the ratios that ZipVL came to.

    A simpler choice is named after the ``tau`` and the variant whose ratio it has: a fixed share of every sparse layer,
    random visual tokens with ZipVL's share of each layer (text stays), and FastV, which chooses once and leaves two
    layers dense.

    Args:
        model: The model that is asked.
        processor: Its processor.
        drawn: Pictures and questions.
        taus: Settings of ZipVL.
        seed: Seed of every random choice.
        on_progress: Told what is being measured.
        progress: A file that keeps what is done, so that an interrupted run goes on; None keeps nothing.

    Raises:
        ValueError: If the file belongs to a run over other tasks.
    """
    asked = hashlib.sha256(repr([(t.first, t.second, t.picture.tiles) for t in drawn]).encode()).hexdigest()
    finished = Finished(progress, _Plan(asked, seed), lambda kept: Outcome(**kept))
    results = finished.results

    def measure(name: str, choose: Callable[[int], KVMethod] | None) -> None:
        on_progress(name)
        finished.once(name, lambda: run_method(model, processor, drawn, choose))

    measure(DENSE, None)
    for tau in taus:
        for label, variant in VARIANTS.items():
            for policy in ("evict", "quantize"):
                recipe = ZipVL(tau=tau, policy=policy, min_tokens=0, seed=seed, **variant).method()
                measure(f"ZipVL {policy} {tau:g}{label}", lambda batch, recipe=recipe: recipe)  # type: ignore[misc]
            shares = results[f"ZipVL evict {tau:g}{label}"].layer_ratios()
            fixed = same_share(shares, **variant)
            measure(f"fixed share {tau:g}{label}", lambda batch, fixed=fixed: fixed)  # type: ignore[misc]
            measure(f"random {tau:g}{label}", lambda batch, shares=shares: random_visual(shares, seed + batch))  # type: ignore[misc]
    raw = ZipVL(min_tokens=0).method_with(MassSelection(tau=0.94, select_by="raw", seed=seed))
    measure("ZipVL evict 0.94, raw scores", lambda batch: raw)
    for share in (0.5, 0.25, 0.1):
        once = fastv(share, min_tokens=0)
        measure(f"FastV {share:g}", lambda batch, once=once: once)  # type: ignore[misc]
    return results


@dataclass(frozen=True)
class _Plan:
    """Which run a progress file belongs to."""

    tasks: str
    seed: int


def same_share(shares: Sequence[float], *, skip_layers: Sequence[int] = (), **probes: int) -> KVMethod:
    """One share in every sparse layer, on average that of ``shares``; ranked by the same probes."""
    sparse = [share for layer, share in enumerate(shares) if layer not in skip_layers]
    mean = sum(sparse) / len(sparse)
    return fixed_share([1.0 if layer in skip_layers else mean for layer in range(len(shares))], min_tokens=0, **probes)


def random_visual(shares: Sequence[float], seed: int) -> KVMethod:
    """Random tokens at given shares of each layer; the text around the picture stays."""
    return random_share(shares, min_tokens=0, seed=seed, protect_first=TEXT_BEFORE, protect_recent=TEXT_AFTER)


def ratio_by_tiles(
    model: PreTrainedModel, processor: Any, *, n: int, tau: float, seed: int, grid: int = 16
) -> dict[int, list[float]]:
    """Token ratios of ``n`` counting tasks in pictures of 1, 4, 8 and 16 tiles."""
    recipe = ZipVL(tau=tau, min_tokens=0, seed=seed).method()
    found = {}
    for tiles in (1, 4, 8, 16):
        drawn = tasks(n, seed=seed, grid=grid, tiles=tiles, kinds=("count",))
        found[tiles] = run_method(model, processor, drawn, lambda batch: recipe).ratios
    return found


def accuracy(outcome: Outcome, *, turn: str = "first") -> Estimate:
    """Share of right answers with its bootstrap interval; ``turn`` is "first" or "second"."""
    return bootstrap_interval(getattr(outcome, turn))


def against(outcome: Outcome, other: Outcome, *, turn: str = "first") -> Estimate:
    """Difference of accuracy on the same tasks."""
    return bootstrap_difference(getattr(outcome, turn), getattr(other, turn))
