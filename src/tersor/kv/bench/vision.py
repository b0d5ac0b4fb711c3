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
from tersor.kv.bench.tiles import FILLER, FILLERS, GRID, KINDS, READ_IN, TILES, Picture, Question, samples
from tersor.kv.method import KVMethod
from tersor.kv.prefill.sparsity import SparsityStats
from tersor.kv.zipvl import ZipVL

#: Questions of one kind that are read together; random choices differ from batch to batch.
BATCH = 10
DENSE = "dense"
#: The paper's default, then ever fewer tokens, down to where ZipVL starts to lose on tiny-vlm.
TAUS = (0.975, 0.9, 0.6, 0.4)
#: The paper's setting, and first layers that stay dense, so that they could carry the picture to the question.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    ", layer 0 dense": {"skip_layers": (0,)},
    ", layers 0 and 1 dense": {"skip_layers": (0, 1)},
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
        ratios: Share of tokens in attention.
        visual: Share of visual tokens in attention, by layer; sums over tasks.
        per_layer: Share of tokens in attention by layer; sums over tasks.
        read: Share of the first question's steps whose cell is kept in the layer that reads it.
        mass: Sum of the captured attention over tasks.
        flops: Sum of the operations saved over tasks.
        kv_bytes: Bytes of all caches.
        dense_bytes: 16 bits for every number of theirs.
    """

    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    visual: list[float] = field(default_factory=list)
    per_layer: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
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

    def visual_ratios(self) -> list[float]:
        """Mean share of visual tokens, by layer."""
        return [each / len(self.first) for each in self.visual]

    def of_kind(self, kind: str, values: Sequence[float] | None = None) -> list[float]:
        """First answers to questions of ``kind``, or others of its ``values``."""
        told = zip(self.first if values is None else values, self.kinds, strict=True)
        return [value for value, own in told if own == kind]

    def add(self, stats: SparsityStats | None, rows: int, layers: int) -> None:
        """Count one batch; None is a dense one."""
        dense = (1.0,) * layers
        self.ratios += (1.0,) * rows if stats is None else stats.per_row
        for held, shares in (
            (self.per_layer, dense if stats is None else stats.per_layer),
            (self.visual, dense if stats is None or stats.visual_per_layer is None else stats.visual_per_layer),
        ):
            held[:] = [total + rows * share for total, share in zip(held or [0.0] * layers, shares, strict=True)]
        self.mass += rows * (1.0 if stats is None else stats.captured_mass)
        self.flops += rows * (0.0 if stats is None else stats.attn_flops_reduction_exact)


def tasks(
    n: int,
    *,
    seed: int,
    kinds: Sequence[str] = KINDS,
    grid: int = GRID,
    tiles: int = TILES,
    fillers: int = FILLERS,
) -> list[Task]:
    """``n`` tasks for each kind of first question; the second is about another colour, of any kind. See `samples`."""
    rng = np.random.default_rng([seed, 7])
    made = []
    for shown, first in samples(n, seed=seed, kinds=kinds, grid=grid, tiles=tiles, fillers=fillers):
        others = [tile.key for tile in shown.tiles if tile.key != first.colour]
        kind, colour = KINDS[int(rng.integers(len(KINDS)))], others[int(rng.integers(len(others)))]
        second = shown.ask(kind, colour, fillers=fillers, start=int(rng.integers(len(FILLER))))
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
    outcome = Outcome(kinds=[task.first.kind for task in drawn])
    layers = model.config.get_text_config().num_hidden_layers
    for start in range(0, len(drawn), BATCH):
        part = drawn[start : start + BATCH]
        inputs = prompt(processor, part)
        follow = processor.tokenizer([f"{t.first.answer} <eos> {t.second.text}" for t in part], return_tensors="pt")
        if choose is None:
            cache: Any = DynamicCache(config=model.config)
            first, second = _two_turns(model, inputs, follow["input_ids"], cache)
            outcome.add(None, len(part), layers)
            outcome.read += [1.0] * len(part)
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
                outcome.read += steps_kept(stats, [task.first for task in part], inputs, processor)
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
    return questions_prompt(processor, [(task.picture, task.first) for task in part])


def questions_prompt(processor: Any, part: Sequence[tuple[Picture, Question]]) -> dict[str, Tensor]:
    """What the model is given for a question about each picture."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        )
        for _, question in part
    ]
    made: dict[str, Tensor] = dict(
        processor(text=texts, images=[shown.pixels for shown, _ in part], return_tensors="pt")
    )
    return made


def steps_kept(
    stats: SparsityStats, asked: Sequence[Question], inputs: dict[str, Tensor], processor: Any
) -> list[float]:
    """Share of each question's steps whose cell is among the tokens kept in the layer that reads it, see `READ_IN`."""
    first = int((inputs["input_ids"][0] == processor.image_token_id).nonzero()[0])
    width = int(inputs["image_grid_thw"][0, 2])
    shares = []
    for row, question in enumerate(asked):
        kept = [
            bool((stats.kept[layer][row] == first + cell[0] * width + cell[1]).any())
            for layer, cell in zip(READ_IN, question.steps, strict=False)
        ]
        shares.append(sum(kept) / len(kept))
    return shares


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
    layers dense. ``policy="quantize"`` runs in the paper's setting.

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
    asked = hashlib.sha256(repr([(t.first, t.second, t.picture) for t in drawn]).encode()).hexdigest()
    finished = Finished(progress, _Plan(asked, seed), lambda kept: Outcome(**kept))
    results = finished.results

    def measure(name: str, choose: Callable[[int], KVMethod] | None) -> None:
        on_progress(name)
        finished.once(name, lambda: run_method(model, processor, drawn, choose))

    measure(DENSE, None)
    for tau in taus:
        for label, variant in VARIANTS.items():
            for policy in ("evict", "quantize") if label == "" else ("evict",):
                recipe = ZipVL(tau=tau, policy=policy, seed=seed, **variant).method()
                measure(f"ZipVL {policy} {tau:g}{label}", lambda batch, recipe=recipe: recipe)  # type: ignore[misc]
            ours = results[f"ZipVL evict {tau:g}{label}"]
            fixed, shares = same_share(ours.layer_ratios(), **variant), ours.visual_ratios()
            measure(f"fixed share {tau:g}{label}", lambda batch, fixed=fixed: fixed)  # type: ignore[misc]
            measure(f"random {tau:g}{label}", lambda batch, shares=shares: random_visual(shares, seed + batch))  # type: ignore[misc]
    for share in (0.5, 0.1):
        once = fastv(share)
        measure(f"FastV {share:g}", lambda batch, once=once: once)  # type: ignore[misc]
    return results


@dataclass(frozen=True)
class _Plan:
    """Which run a progress file belongs to."""

    tasks: str
    seed: int


def same_share(shares: Sequence[float], *, skip_layers: Sequence[int] = ()) -> KVMethod:
    """One share in every sparse layer, on average that of ``shares``; ranked by the same probes."""
    sparse = [share for layer, share in enumerate(shares) if layer not in skip_layers]
    mean = sum(sparse) / len(sparse)
    return fixed_share([1.0 if layer in skip_layers else mean for layer in range(len(shares))])


def random_visual(shares: Sequence[float], seed: int) -> KVMethod:
    """Random visual tokens at given shares of each layer; all text stays."""
    return random_share(shares, visual_only=True, seed=seed)


def accuracy(outcome: Outcome, *, turn: str = "first") -> Estimate:
    """Share of right answers with its bootstrap interval; ``turn`` is "first" or "second"."""
    return bootstrap_interval(getattr(outcome, turn))


def against(outcome: Outcome, other: Outcome, *, turn: str = "first", drawn: bool = False) -> Estimate:
    """Difference of accuracy on the same tasks.

    Args:
        outcome: The contender.
        other: What it is compared with.
        turn: "first" or "second".
        drawn: Whether one of them is a random choice that a batch shares: then batches are resampled, not tasks.
    """
    left, right = getattr(outcome, turn), getattr(other, turn)
    if drawn:
        left, right = _by_batch(left), _by_batch(right)
    return bootstrap_difference(left, right)


def _by_batch(values: Sequence[float]) -> list[float]:
    return [float(np.mean(values[start : start + BATCH])) for start in range(0, len(values), BATCH)]
