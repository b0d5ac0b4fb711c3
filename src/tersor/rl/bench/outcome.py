"""What a model of tiny-vlm needs and answers: accuracy, tokens in attention, and whether they are the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tersor.kv.bench.peers.sparse import random_share
from tersor.kv.bench.tiles import KINDS, Picture, Question
from tersor.kv.bench.vision import questions_prompt, steps_kept
from tersor.kv.method import KVMethod
from tersor.kv.zipvl import ZipVL

#: Questions that are read together.
BATCH = 25


@dataclass
class Outcome:
    """First answers to questions, and what was read for them.

    Args:
        right: 1.0 where the answer was right, 0.0 elsewhere.
        kinds: Kind of each question.
        ratios: Share of tokens in attention, mean over the sparse layers.
        layers: Sum over questions of the share, by layer.
        visual: Sum over questions of the share of visual tokens, by layer.
        read: Share of a question's steps whose cell was kept in the layer that reads it.
        relevant: Share of the kept visual tokens, over sparse layers, that are cells of the question's path.
    """

    right: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)
    visual: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    relevant: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(np.mean(self.right))

    @property
    def ratio(self) -> float:
        """Mean share of tokens in attention over the sparse layers."""
        return float(np.mean(self.ratios))

    def of_kind(self, kind: str) -> float:
        """Share of right answers to questions of ``kind``."""
        return float(np.mean([right for right, own in zip(self.right, self.kinds, strict=True) if own == kind]))

    def by_kind(self) -> dict[str, float]:
        """`of_kind` of every kind."""
        return {kind: self.of_kind(kind) for kind in KINDS if kind in self.kinds}

    def visual_ratios(self) -> list[float]:
        """Mean share of visual tokens, by layer."""
        return [total / len(self.right) for total in self.visual]


def right_words(shown: Picture, asked: Question, *, checked: bool) -> list[str]:
    """The words that are right: the answer, or with ``checked`` the word of any tile on the way to it."""
    return [tile.value for tile in shown.path(asked.kind, asked.colour)] if checked else [asked.answer]


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    processor: Any,
    drawn: Sequence[tuple[Picture, Question]],
    tau: float,
    *,
    skip_layers: tuple[int, ...] = (),
    checked: bool = False,
    random: Sequence[float] | None = None,
    seed: int = 0,
) -> Outcome:
    """Ask every question once.

    Args:
        model: The model that is asked.
        processor: Its processor.
        drawn: Pictures and questions.
        tau: ZipVL's threshold; 1 is dense.
        skip_layers: Layers that stay dense.
        checked: See `right_words`.
        random: Take random visual tokens instead, at these shares of each layer.
        seed: Seed of those.
    """
    found = Outcome(kinds=[question.kind for _, question in drawn])
    for start in range(0, len(drawn), BATCH):
        part = drawn[start : start + BATCH]
        inputs = questions_prompt(processor, part)
        if tau == 1.0:
            said = model(**inputs, use_cache=False, logits_to_keep=1).logits
        else:
            method: KVMethod = ZipVL(tau=tau, skip_layers=skip_layers, min_tokens=0).method()
            if random is not None:
                method = random_share(random, visual_only=True, min_tokens=0, seed=seed + start)
            with method.on(model) as session:
                said = model(**inputs, logits_to_keep=1).logits
                _count(found, session.stats, [asked for _, asked in part], inputs, processor, skip_layers)
        words = processor.tokenizer.convert_ids_to_tokens(said[:, -1].argmax(-1).tolist())
        found.right += [
            float(word in right_words(*pair, checked=checked)) for word, pair in zip(words, part, strict=True)
        ]
    return found


def _count(
    into: Outcome, stats: Any, asked: list[Question], inputs: dict[str, Any], processor: Any, dense: tuple[int, ...]
) -> None:
    rows = len(asked)
    for held, shares in ((into.layers, stats.per_layer), (into.visual, stats.visual_per_layer)):
        held[:] = [total + rows * share for total, share in zip(held or [0.0] * len(shares), shares, strict=True)]
    sparse = [layer for layer in range(len(stats.per_layer)) if layer not in dense]
    into.read += steps_kept(stats, asked, inputs, processor)
    first = int((inputs["input_ids"][0] == processor.image_token_id).nonzero()[0])
    width, cells = int(inputs["image_grid_thw"][0, 2]), int(inputs["image_grid_thw"][0].prod())
    for row, question in enumerate(asked):
        tokens = stats.tokens[row]
        into.ratios.append(sum(len(stats.kept[layer][row]) for layer in sparse) / tokens / len(sparse))
        path = torch.tensor([first + r * width + c for r, c in question.steps])
        kept = torch.cat([stats.kept[layer][row] for layer in sparse])
        seen = kept[(kept >= first) & (kept < first + cells)]
        into.relevant.append(float(torch.isin(seen, path).float().mean()) if len(seen) else 1.0)
